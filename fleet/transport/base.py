"""The only seam for I/O between the programs of the fleet: publish, subscribe, watch the link."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Final, Protocol, Self

from fleet.errors import LinkError
from fleet.protocol.topics import matches

Handler = Callable[[str, bytes], None]
MAX_PACKET_BYTES: Final = 1 << 20  # a packet on any of the fleet's brokers
MAX_IN_FLIGHT: Final = 100  # QoS 1 messages sent and not yet acknowledged, on either side
MAX_QUEUED: Final = 1000  # QoS 1 messages kept for a link that is down
MAX_RETAINED: Final = 100  # more of them if they are retained: a status outlasts other messages

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Will:
    """The message that the broker publishes (QoS 1, retained) when the connection breaks."""

    topic: str
    payload: bytes


class Transport(Protocol):
    """A connection to a broker under one name.

    Handlers run one after the other on the transport's own thread; they must not block. After a
    lost connection the transport reconnects by itself, subscribes again, and calls every `on_up`
    callback again.
    """

    name: str

    @property
    def is_up(self) -> bool:
        """Whether the link to the broker is up."""
        ...

    def publish(self, topic: str, payload: bytes, *, qos: int = 0, retain: bool = False) -> None:
        """Send one message. QoS 1 is queued while the link is down.

        Raises:
            LinkError: QoS 0 and the link is down, or the queue is full.
        """
        ...

    def flush(self, timeout_s: float) -> None:
        """Wait, at most `timeout_s` seconds, until the published messages are on the network."""
        ...

    def subscribe(
        self, topic_filter: str, handler: Handler, *, qos: int = 0, retained: bool = False
    ) -> None:
        """Call ``handler(topic, payload)`` for each message under the filter, reconnects included.

        `retained` states that the filter normally has a retained message. A broker that does not
        know the client's rights yet sends nothing, and drops the client's messages, without an
        error. So the subscription is repeated until a message arrives. That counts as a link that
        has come up: every filter is subscribed to again, and the `on_up` callbacks are called.
        """
        ...

    def unsubscribe(self, topic_filter: str) -> None:
        """Remove the handler of a filter."""
        ...

    def on_up(self, callback: Callable[[], None]) -> None:
        """Call `callback` now if the link is up, and each time that it comes up.

        A client announces itself in it. The callback runs before retained messages arrive again.
        """
        ...

    def off_up(self, callback: Callable[[], None]) -> None:
        """Remove a callback of `on_up`."""
        ...

    def close(self) -> None:
        """Disconnect regularly, so that the will is not sent, within a few seconds."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


def dispatch(handlers: Iterable[tuple[str, Handler]], topic: str, payload: bytes) -> None:
    """Call each handler whose filter covers `topic`; log one that fails and call the others."""
    for topic_filter, handler in handlers:
        if matches(topic_filter, topic):
            run_guarded(partial(handler, topic, payload), f"handler of {topic_filter}")


def publish_or_log(
    transport: Transport, topic: str, payload: bytes, *, qos: int = 0, retain: bool = False
) -> None:
    """Publish a message; log one that cannot be sent."""
    try:
        transport.publish(topic, payload, qos=qos, retain=retain)
    except LinkError as error:
        logger.warning("not sent on %s: %s", topic, error)


def run_guarded(call: Callable[[], None], name: str) -> None:
    """Run a callback on the transport's thread, which must go on: log an exception."""
    try:
        call()
    except Exception:
        logger.exception("%s failed", name)
