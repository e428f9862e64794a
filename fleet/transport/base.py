"""The one seam for I/O between the parts of the fleet: publish, subscribe, and know whether the link is up."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Protocol, Self

from fleet.errors import LinkError
from fleet.protocol.topics import matches

Handler = Callable[[str, bytes], None]
MAX_QUEUED: Final = 1000  # QoS 1 messages kept for a link that is down
MAX_RETAINED: Final = (
    100  # so many retained ones beside them: what one is must not get lost behind what one said
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Will:
    """What the broker publishes (QoS 1, retained) when this client's connection breaks."""

    topic: str
    payload: bytes


class Transport(Protocol):
    """A connection to a broker under one name.

    Handlers run one after the other on the transport's own thread; they must not block. After a lost connection
    the transport connects again by itself, subscribes again, and calls every `on_up` callback again.
    """

    name: str

    @property
    def is_up(self) -> bool:
        """Whether the broker can be reached now."""
        ...

    def publish(self, topic: str, payload: bytes, *, qos: int = 0, retain: bool = False) -> None:
        """Hands one message to the link. QoS 1 is queued while the link is down.

        Raises:
            LinkError: QoS 0 and the link is down, or the queue is full.
        """
        ...

    def flush(self, timeout_s: float) -> None:
        """Returns when what was published has gone to the network, or after `timeout_s` seconds."""
        ...

    def subscribe(
        self, topic_filter: str, handler: Handler, *, qos: int = 0, retained: bool = False
    ) -> None:
        """Calls ``handler(topic, payload)`` for what arrives under the filter, from now on and after reconnects.

        `retained` says that something is retained there as a rule. A broker that does not know our rights yet sends
        nothing and drops what we say, without a word; so where nothing comes it is asked again. What comes then is as
        if the link had come up: every filter is subscribed to once more, and the `on_up` callbacks are called.
        """
        ...

    def unsubscribe(self, topic_filter: str) -> None: ...

    def on_up(self, callback: Callable[[], None]) -> None:
        """Calls `callback` now if the link is up, and each time that it comes up: the place to announce oneself.

        Then it is called before what is retained comes again.
        """
        ...

    def off_up(self, callback: Callable[[], None]) -> None:
        """Calls `callback` no more."""
        ...

    def close(self) -> None:
        """Disconnects in good order (the will is not sent) within a few seconds."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


def dispatch(handlers: Iterable[tuple[str, Handler]], topic: str, payload: bytes) -> None:
    """Calls every handler whose filter takes `topic`. One that fails is logged and stops nobody else."""
    for topic_filter, handler in handlers:
        if matches(topic_filter, topic):
            guarded(lambda handler=handler: handler(topic, payload), f"handler of {topic_filter}")  # type: ignore[misc]


def publish_or_log(
    transport: Transport, topic: str, payload: bytes, *, qos: int = 0, retain: bool = False
) -> None:
    """Publishes; a message that cannot be sent costs a line in the log."""
    try:
        transport.publish(topic, payload, qos=qos, retain=retain)
    except LinkError as error:
        logger.warning("not sent on %s: %s", topic, error)


def guarded(call: Callable[[], None], what: str) -> None:
    """Runs a callback of somebody else on the transport's thread, which must outlive it."""
    try:
        call()
    except Exception:
        logger.exception("%s failed", what)
