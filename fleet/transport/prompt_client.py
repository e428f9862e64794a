"""An app's side of a prompt: send it, follow the stream of replies."""

from __future__ import annotations

import logging
import queue
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Final

import msgspec

from fleet.errors import FleetError, LinkError, PromptError
from fleet.protocol import topics
from fleet.protocol.prompt import PromptRequest, Reply, decode_reply
from fleet.transport.base import Transport

log = logging.getLogger(__name__)

REPLY_TIMEOUT_S: Final = 60.0
REPEAT_S: Final = 5.0


class PromptClient:
    """Asks devices under the transport's name, an app's or an operator's."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._streams: dict[str, _Stream] = {}
        transport.subscribe(topics.reply("+", transport.name, "+"), self._on_reply, qos=1)
        transport.on_up(self._link_up)

    def ask(
        self, device: str, prompt: PromptRequest, timeout_s: float = REPLY_TIMEOUT_S
    ) -> Iterator[Reply]:
        """The replies of one request, in order, each once; the last one has `done`. An abandoned stream is cancelled.

        What the broker lost is asked for again: the device repeats the replies of a request that it knows.

        Raises:
            LinkError: no new reply within `timeout_s` of the one before, or the device was started again meanwhile.
            PromptError: the device refused the request.
        """
        request = uuid.uuid4().hex
        topic = topics.prompt(device, self._transport.name, request)
        payload = msgspec.json.encode(prompt)
        stream = self._streams[request] = _Stream(
            lambda: self._transport.publish(topic, payload, qos=1)
        )
        done = False
        try:
            stream.ask()
            while not done:
                reply = stream.next(timeout_s)
                if reply is None:
                    raise LinkError(
                        f"device {device} did not answer within {timeout_s:g} s; is it running? see 'fleet devices'"
                    )
                done = reply.done
                if reply.error:
                    raise PromptError(
                        f"device {device} refused ({reply.error.code}): {reply.error.message}"
                    )
                yield reply
        finally:
            del self._streams[request]
            if not done:
                self._cancel(device, request)

    def _cancel(self, device: str, request: str) -> None:
        try:
            self._transport.publish(
                topics.cancel(device, self._transport.name, request), b"", qos=1
            )
        except LinkError as error:
            log.warning("request %s was not cancelled: %s", request, error)

    def _link_up(self) -> None:
        for stream in list(self._streams.values()):
            stream.ask()

    def _on_reply(self, topic: str, payload: bytes) -> None:
        try:
            _, _, request = topics.parse(topic, "d", "+", "reply", "+", "+")
            if stream := self._streams.get(request):
                stream.put(decode_reply(payload))
        except FleetError as error:
            log.warning("reply on %s dropped: %s", topic, error)


class _Stream:
    """The replies of one request, put back into order."""

    def __init__(self, ask: Callable[[], None]) -> None:
        self.ask = ask
        self._arrived: queue.Queue[Reply] = queue.Queue()
        self._early: dict[int, Reply] = {}
        self._next = 0
        self._generation: str | None = None

    def put(self, reply: Reply) -> None:
        self._arrived.put(reply)

    def next(self, timeout_s: float) -> Reply | None:
        """The next reply in order, None when it does not come; asks again every `REPEAT_S` until it does.

        Raises:
            LinkError: the device has begun the answer anew.
        """
        deadline = time.monotonic() + timeout_s
        repeat_at = time.monotonic() + REPEAT_S
        while self._next not in self._early:
            now = time.monotonic()
            if now >= deadline:
                return None
            if now >= repeat_at:
                self.ask()
                repeat_at = now + REPEAT_S
            with suppress(queue.Empty):
                self._take(self._arrived.get(timeout=min(deadline, repeat_at) - now))
        self._next += 1
        return self._early.pop(self._next - 1)

    def _take(self, reply: Reply) -> None:
        if reply.generation and self._generation and reply.generation != self._generation:
            raise LinkError("the device was started again and has forgotten this answer; ask again")
        self._generation = reply.generation or self._generation
        if reply.seq >= self._next:
            self._early[reply.seq] = reply
