"""The prompts of a house: sent as an app of the fleet, and their answers brought back."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Final, Self

from msgspec.structs import replace

from fleet.errors import BusyError, FleetError
from fleet.protocol.prompt import PromptRequest, Reply
from fleet.protocol.triggers import trigger_of
from fleet.transport.async_prompt_client import AsyncPromptClient, AsyncReplyStream
from fleet.transport.base import Transport
from fleet.transport.prompt_client import reply_timeout_s

MAX_OPEN: Final = 32  # prompts of a house at a time
STOP_S: Final = 5.0

log = logging.getLogger(__name__)

OnAnswer = Callable[[str, str | None, Reply | FleetError], None]
"""Called with the device, the trigger's name (None for a prompt) and the answer."""


class PromptRelay:
    """A context manager that sends prompts under the transport's name, on a thread of its own.

    `on_answer` also gets answers to events: triggers send them to the app that published the event.
    """

    def __init__(self, link: Transport, on_answer: OnAnswer) -> None:
        self._client = AsyncPromptClient(link, link.name, self._on_other)
        self._on_answer = on_answer
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="relay", daemon=True)
        self._open: set[Future[None]] = set()
        self._streams: set[AsyncReplyStream] = set()

    def __enter__(self) -> Self:
        self._thread.start()
        self._client.open()
        return self

    def __exit__(self, *_: object) -> None:
        """Cancel the open prompts, also at their devices."""
        asyncio.run_coroutine_threadsafe(_cancel_all(), self._loop).result(STOP_S)
        self._client.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(STOP_S)
        self._loop.close()

    def send(self, device: str, prompt: PromptRequest) -> None:
        """Send a prompt; its answer comes as one reply. Any thread may call.

        Raises:
            BusyError: too many prompts wait for their answers.
        """
        if len(self._open) >= MAX_OPEN:
            raise BusyError(f"{MAX_OPEN} prompts of the house wait for answers; try again later")
        work = self._ask(device, replace(prompt, stream=False))
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        self._open.add(future)
        future.add_done_callback(self._end)

    def _end(self, future: Future[None]) -> None:
        self._open.discard(future)
        if not future.cancelled() and (error := future.exception()):
            log.error("a prompt of the house has no answer", exc_info=error)

    def fail(self, device: str, error: FleetError) -> None:
        """End the prompts to a device with an error. Any thread may call."""
        for stream in list(self._streams):
            if stream.device == device:
                stream.fail(error)

    async def _ask(self, device: str, prompt: PromptRequest) -> None:
        try:
            answer: Reply | FleetError = await self._last_reply(device, prompt)
        except FleetError as error:
            answer = error
        self._on_answer(device, None, answer)

    async def _last_reply(self, device: str, prompt: PromptRequest) -> Reply:
        with self._client.ask(device, prompt) as stream:
            self._streams.add(stream)
            try:
                reply = await stream.next(reply_timeout_s(prompt))
                while not reply.done:  # a text beyond the limit of one reply
                    reply = await stream.next()
                return reply
            finally:
                self._streams.discard(stream)

    def _on_other(self, device: str, request: str, reply: Reply) -> None:
        trigger = trigger_of(request)
        if trigger and reply.done:
            self._on_answer(device, trigger, reply)


async def _cancel_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
