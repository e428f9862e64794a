"""The requests of an app that are not complete: sent, repeated, cancelled."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Final, Generic, Protocol, TypeAlias, TypeVar

from fleet.errors import FleetError, LinkError
from fleet.protocol import topics
from fleet.protocol.prompt import Reply, decode_reply
from fleet.protocol.report import DeviceStatus, decode_status
from fleet.transport.base import Transport
from fleet.utils.printable import printable_line
from fleet.utils.rate_limited_log import RateLimitedLog

log = logging.getLogger(__name__)
reply_log = RateLimitedLog(log, 10.0)

OtherReply: TypeAlias = Callable[[str, str, Reply], None]  # device, request, reply

MAX_ANSWER_BYTES: Final = 32 << 20
"""The replies to one request together, also those that are repeated."""

OFFLINE_S: Final = 10.0
"""How long a device that has gone offline may need to come back in the midst of an answer."""


class ReplyStream(Protocol):
    """The replies of one request, as its client reads them."""

    is_done: bool

    def send_request(self) -> None:
        """Send the request, also once more: a device that knows it sends its replies again."""

    def put(self, reply: Reply) -> None:
        """Add a reply that has arrived; called on the transport's thread."""

    def fail(self, error: FleetError) -> None:
        """End the wait for replies with an error. Any thread may call."""


S = TypeVar("S", bound=ReplyStream)


class OpenRequests(Generic[S]):
    """The open requests of one app, by their ids. They are repeated when the link is up again.

    Replies to other requests, such as those of triggers, go to `on_other`.
    """

    def __init__(self, transport: Transport, app: str, on_other: OtherReply | None = None) -> None:
        self._transport = transport
        self._app = app
        self._on_other = on_other
        self._streams: dict[str, S] = {}
        self._num_bytes: dict[str, int] = {}
        self._watched: set[str] = set()
        self._offline_since: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._streams)

    def open(self) -> None:
        """Subscribe to the replies, which waits for the broker."""
        self._transport.subscribe(topics.replies_to(self._app), self._on_reply, qos=1)
        self._transport.on_up(self._repeat)

    def close(self) -> None:
        """Unsubscribe."""
        self._transport.off_up(self._repeat)
        self._transport.unsubscribe(topics.replies_to(self._app))

    def watch(self, device: str) -> None:
        """Follow the status of a device, which the app may read. It waits for the broker."""
        topic = topics.device_status(topics.check_name(device))
        if device not in self._watched:
            self._watched.add(device)
            handler = partial(self._on_status, device)
            self._transport.subscribe(topic, handler, qos=1, retained=True)

    def wait_end(self, device: str, deadline: float) -> float:
        """Return the monotonic time at which a wait for the device ends, `deadline` or earlier.

        It ends `OFFLINE_S` seconds after a device that is watched has gone offline.
        """
        offline_since = self._offline_since.get(device)
        return deadline if offline_since is None else min(deadline, offline_since + OFFLINE_S)

    def silence(self, device: str, timeout_s: float) -> LinkError:
        """Return the error of a device that has not responded until the end of a wait."""
        if device in self._offline_since:
            return LinkError(
                f"device {device} has gone offline and lost this request; send the prompt again "
                "when it is back, see 'fleet devices'"
            )
        return LinkError(
            f"device {device} did not respond within {timeout_s:g} s; is it running? "
            "see 'fleet devices'"
        )

    @contextmanager
    def follow(self, device: str, request: str, stream: S) -> Iterator[S]:
        """Send a request. At the end of the block it is cancelled unless the stream is done.

        Raises:
            LinkError: the queue of the link is full.
        """
        self._num_bytes[request] = 0
        self._streams[request] = stream
        try:
            stream.send_request()
            yield stream
        finally:
            del self._streams[request]
            del self._num_bytes[request]
            if not stream.is_done:
                self._cancel(device, request)

    def _cancel(self, device: str, request: str) -> None:
        try:
            topic = topics.device_cancel(device, self._app, request)
            self._transport.publish(topic, b"", qos=1)
        except LinkError as error:
            log.warning("request %s was not cancelled: %s", request, error)

    def _repeat(self) -> None:
        for stream in list(self._streams.values()):
            stream.send_request()

    def _on_status(self, device: str, _: str, payload: bytes) -> None:
        if decode_status(payload, DeviceStatus).online:
            self._offline_since.pop(device, None)
        else:
            self._offline_since.setdefault(device, time.monotonic())

    def _on_reply(self, topic: str, payload: bytes) -> None:
        try:
            device, _, request = topics.parse_topic(topic, topics.REPLY_FILTER)
            if stream := self._streams.get(request):
                self._put(device, request, stream, payload)
            elif self._on_other:
                self._on_other(device, request, decode_reply(payload))
        except FleetError as error:
            reply_log.warning("reply on %s dropped: %s", printable_line(topic), error)

    def _put(self, device: str, request: str, stream: S, payload: bytes) -> None:
        """Hand a reply to its stream, which fails when its device does not stop to send."""
        num_bytes = self._num_bytes.get(request, 0) + len(payload)  # it may just have ended
        if num_bytes <= MAX_ANSWER_BYTES:
            stream.put(decode_reply(payload))
        else:
            stream.fail(
                LinkError(
                    f"device {device} sent more than {MAX_ANSWER_BYTES:,} bytes of replies to one "
                    "prompt, and was cut off; ask for fewer tokens, or look at the device"
                )
            )
        if request in self._num_bytes:
            self._num_bytes[request] = num_bytes
