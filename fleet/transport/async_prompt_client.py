"""The app's side of a prompt on an event loop, also for apps without a connection of their own."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from functools import partial

import msgspec

from fleet.errors import FleetError, LinkError
from fleet.protocol import topics
from fleet.protocol.prompt import PromptRequest, Reply
from fleet.transport.base import Transport
from fleet.transport.open_requests import OpenRequests, OtherReply
from fleet.transport.prompt_client import (
    REPEAT_S,
    REPLY_TIMEOUT_S,
    AnswerTime,
    ReplyOrder,
    check_not_refused,
)

log = logging.getLogger(__name__)


class AsyncPromptClient:
    """A client that sends prompts as `app`: the transport's own name, or any if it is a gateway's.

    `open` and `close` may be called on any thread; `open` waits for the broker. Replies to other
    requests go to `on_other`, on the transport's thread.
    """

    def __init__(self, transport: Transport, app: str, on_other: OtherReply | None = None) -> None:
        self._transport = transport
        self._app = app
        self._requests = OpenRequests[AsyncReplyStream](transport, app, on_other)

    def open(self) -> None:
        """Subscribe to the replies."""
        self._requests.open()

    def close(self) -> None:
        """Unsubscribe."""
        self._requests.close()

    def watch(self, device: str) -> None:
        """Follow the status of a device, as `PromptClient.watch` does. Not on the event loop."""
        self._requests.watch(device)

    @property
    def is_idle(self) -> bool:
        """Whether no request is open."""
        return not self._requests

    def ask(self, device: str, prompt: PromptRequest) -> AbstractContextManager[AsyncReplyStream]:
        """Send a prompt. At the end of the block its answer is cancelled unless it is complete.

        Raises:
            LinkError: the queue of the link is full.
            TopicError: `device` cannot be a name.
        """
        request = uuid.uuid4().hex
        topic = topics.device_prompt(topics.check_name(device), self._app, request)
        publish = partial(
            self._transport.publish, topic, payload=msgspec.json.encode(prompt), qos=1
        )
        time_left = AnswerTime(device, prompt)
        stream = AsyncReplyStream(self._requests, device, time_left, publish)
        return self._requests.follow(device, request, stream)


class AsyncReplyStream:
    """The replies of one request, for a task that waits for them.

    `put` and `fail` may be called on any thread. `has_begun` is whether a reply has arrived.
    """

    def __init__(
        self,
        requests: OpenRequests[AsyncReplyStream],
        device: str,
        time_left: AnswerTime,
        publish_request: Callable[[], None],
    ) -> None:
        self.device = device
        self._time_left = time_left
        self.has_begun = False
        self.is_done = False
        self._requests = requests
        self._publish_request = publish_request
        self._loop = asyncio.get_running_loop()
        self._arrived: asyncio.Queue[Reply | None] = asyncio.Queue()
        self._order = ReplyOrder()
        self._error: FleetError | None = None

    def send_request(self) -> None:
        """Send the request, also once more: the device knows it."""
        self._publish_request()

    def put(self, reply: Reply) -> None:
        """Add a reply that has arrived."""
        self.has_begun = True
        self._wake(reply)

    def fail(self, error: FleetError) -> None:
        """Make `next` raise an error from now on."""
        self._error = error
        self._wake(None)

    def _wake(self, reply: Reply | None) -> None:
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._arrived.put_nowait, reply)

    async def next(self, timeout_s: float = REPLY_TIMEOUT_S) -> Reply:
        """Return the next reply in order. The field `done` is set in the last one.

        The request is repeated every `REPEAT_S` seconds until the reply arrives; a device that
        knows the request then sends its replies again.

        Raises:
            LinkError: it did not come within `timeout_s` seconds, or the device has restarted, or
                has not ended its answer in time.
            RefusedPromptError: the device refused the request.
            FleetError: the error of `fail`.
        """
        self._time_left.check()
        deadline = time.monotonic() + timeout_s
        while True:
            if self._error:
                raise self._error
            if reply := self._order.pop():
                self.is_done = reply.done
                check_not_refused(self.device, reply)
                return reply
            if arrived := await self._receive(deadline, timeout_s):
                self._order.store(arrived)

    async def _receive(self, deadline: float, timeout_s: float) -> Reply | None:
        left_s = self._requests.wait_end(self.device, deadline) - time.monotonic()
        if left_s <= 0:
            raise self._requests.silence(self.device, timeout_s)
        try:
            return await asyncio.wait_for(self._arrived.get(), min(REPEAT_S, left_s))
        except TimeoutError:
            with suppress(LinkError):  # its queue is full; the next attempt may succeed
                self.send_request()
            return None
