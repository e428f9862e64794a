"""The app's side of a prompt: send it and follow the stream of replies."""

from __future__ import annotations

import queue
import time
import uuid
from collections.abc import Callable, Generator
from contextlib import suppress
from functools import partial
from typing import Final, Protocol

import msgspec

from fleet.errors import FleetError, LinkError, RefusedPromptError
from fleet.protocol import topics
from fleet.protocol.prompt import PromptRequest, Reply
from fleet.protocol.types import MAX_DEADLINE_MS
from fleet.transport.base import Transport
from fleet.transport.open_requests import OpenRequests

REPLY_TIMEOUT_S: Final = 60.0
REPEAT_S: Final = 5.0


class Prompter(Protocol):
    """A client that sends prompts to devices."""

    def ask(self, device: str, prompt: PromptRequest) -> Generator[Reply, None, None]:
        """Yield each reply of one request, in order, as `PromptClient.ask` does."""
        ...


class PromptClient:
    """A client that sends prompts under the transport's name, as an app or an operator."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._requests = OpenRequests[_ReplyStream](transport, transport.name)
        self._requests.open()

    def watch(self, device: str) -> None:
        """Follow the status of a device, which this client may read.

        From now on a request to it fails `OFFLINE_S` seconds after it has gone offline.
        """
        self._requests.watch(device)

    def ask(
        self, device: str, prompt: PromptRequest, timeout_s: float | None = None
    ) -> Generator[Reply, None, None]:
        """Yield each reply of one request once, in order. The field `done` is set in the last one.

        When the caller stops iterating, the request is cancelled. A request without replies is sent
        again; a device that knows the request then sends its replies again. The default of
        `timeout_s` is `REPLY_TIMEOUT_S`, and the time of the whole answer more without `stream`.

        Raises:
            LinkError: no reply came within `timeout_s` seconds of the previous one, or the device
                has restarted, or does not end its answer, or is watched and has gone offline.
            RefusedPromptError: the device refused the request.
            TopicError: `device` cannot be a name.
        """
        request = uuid.uuid4().hex
        topic = topics.device_prompt(topics.check_name(device), self._transport.name, request)
        payload = msgspec.json.encode(prompt)
        publish = partial(self._transport.publish, topic, payload, qos=1)
        stream = _ReplyStream(AnswerTime(device, prompt), publish)
        timeout_s = reply_timeout_s(prompt) if timeout_s is None else timeout_s
        with self._requests.follow(device, request, stream):
            while not stream.is_done:
                reply = stream.next(timeout_s, partial(self._requests.wait_end, device))
                if reply is None:
                    raise self._requests.silence(device, timeout_s)
                stream.is_done = reply.done
                check_not_refused(device, reply)
                yield reply


def reply_timeout_s(prompt: PromptRequest) -> float:
    """Return the longest time without a reply after which a device counts as lost."""
    answer_ms = 0 if prompt.stream else prompt.deadline_ms or MAX_DEADLINE_MS
    return REPLY_TIMEOUT_S + answer_ms / 1000


class AnswerTime:
    """The time within which a device has to end its answer to a prompt.

    A device keeps to the prompt's deadline by itself, unless it is faulty or hostile.
    """

    def __init__(self, device: str, prompt: PromptRequest) -> None:
        answer_ms = prompt.deadline_ms or MAX_DEADLINE_MS
        self._device = device
        self._end = time.monotonic() + answer_ms / 1000 + REPLY_TIMEOUT_S

    def check(self) -> None:
        """Raise LinkError when the time is over."""
        if time.monotonic() > self._end:
            raise LinkError(
                f"device {self._device} has not ended its answer, although its deadline is over; "
                "it was cancelled; look at the device"
            )


def check_not_refused(device: str, reply: Reply) -> None:
    """Raise RefusedPromptError for a reply with an error."""
    if reply.error:
        reason = f"({reply.error.code}): {reply.error.message}"
        raise RefusedPromptError(f"device {device} refused {reason}", reply.error.code)


class ReplyOrder:
    """The replies of one request, put back into order; each comes out once."""

    def __init__(self) -> None:
        self._early: dict[int, Reply] = {}
        self._next = 0
        self._generation: str | None = None

    def store(self, reply: Reply) -> None:
        """Add a reply that has arrived. Raises LinkError if the device has restarted."""
        if reply.generation and self._generation and reply.generation != self._generation:
            raise LinkError("the device has restarted and lost this request; send the prompt again")
        self._generation = reply.generation or self._generation
        if reply.seq >= self._next:
            self._early[reply.seq] = reply

    def pop(self) -> Reply | None:
        """Return the next reply in order; None if it has not arrived."""
        reply = self._early.pop(self._next, None)
        self._next += reply is not None
        return reply


class _ReplyStream:
    """The replies of one request, for a thread that waits for them."""

    def __init__(self, time_left: AnswerTime, publish_request: Callable[[], None]) -> None:
        self.is_done = False
        self._time_left = time_left
        self._publish_request = publish_request
        self._arrived: queue.Queue[Reply | FleetError] = queue.Queue()
        self._order = ReplyOrder()

    def send_request(self) -> None:
        self._publish_request()

    def put(self, reply: Reply) -> None:
        self._arrived.put(reply)

    def fail(self, error: FleetError) -> None:
        self._arrived.put(error)

    def next(self, timeout_s: float, wait_end: Callable[[float], float]) -> Reply | None:
        """Return the next reply in order, or None after `timeout_s` seconds.

        `wait_end` is `OpenRequests.wait_end` of the device. The request is repeated every
        `REPEAT_S` seconds until the reply arrives.

        Raises:
            LinkError: the device has restarted, or has not ended its answer in time.
            FleetError: the error of `fail`.
        """
        self._time_left.check()
        deadline = time.monotonic() + timeout_s
        repeat_at = time.monotonic() + REPEAT_S
        while (reply := self._order.pop()) is None:
            now = time.monotonic()
            end = wait_end(deadline)
            if now >= end:
                return None
            if now >= repeat_at:
                self.send_request()
                repeat_at = now + REPEAT_S
            with suppress(queue.Empty):
                self._store(self._arrived.get(timeout=min(end, repeat_at) - now))
        return reply

    def _store(self, arrived: Reply | FleetError) -> None:
        if isinstance(arrived, FleetError):
            raise arrived
        self._order.store(arrived)
