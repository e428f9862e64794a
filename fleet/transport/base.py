"""The interface for all messages between the programs of the fleet: publish, subscribe, and watch
the link.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final, Protocol, Self

from fleet.errors import LinkError
from fleet.protocol.topics import matches
from fleet.utils.rate_limited_log import RateLimitedLog

Handler = Callable[[str, bytes], None]
MAX_PACKET_BYTES: Final = 1 << 20  # largest packet that the fleet's brokers accept
MAX_IN_FLIGHT: Final = 100  # QoS 1 messages sent and not yet acknowledged, in each direction
MAX_QUEUED: Final = 1000  # messages of each QoS that wait; those of QoS 0 on a link that is slow
MAX_RETAINED: Final = 100  # places in addition, only for retained messages such as a status

logger = logging.getLogger(__name__)
replay_log = RateLimitedLog(logger, 10.0)


@dataclass(frozen=True)
class Will:
    """The message that the broker publishes (QoS 1, retained) when the connection breaks."""

    topic: str
    payload: bytes


@dataclass(frozen=True)
class Subscription:
    """The handler of a topic filter. With `live_only` it receives no retained messages."""

    handler: Handler
    qos: int = 0
    live_only: bool = False


class Transport(Protocol):
    """A connection to a broker under one name.

    Handlers run one after the other on the transport's own thread; they must not block. After the
    connection is lost, the transport reconnects by itself, subscribes again, and calls each `on_up`
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
            LinkError: the link is down (QoS 0), or too many messages of the same QoS wait.
        """
        ...

    def flush(self, timeout_s: float) -> None:
        """Wait, at most `timeout_s` seconds, until the published messages are on the network."""
        ...

    def subscribe(
        self,
        topic_filter: str,
        handler: Handler,
        *,
        qos: int = 0,
        retained: bool = False,
        live_only: bool = False,
    ) -> None:
        """Call ``handler(topic, payload)`` for each message under the filter, until `unsubscribe`.

        `retained` states that the filter normally has a retained message. A broker that does not
        know the client's rights yet sends nothing, and drops the client's messages, without an
        error. So the subscription is repeated until a message arrives. The transport then acts as
        if the link had come up: it subscribes to each filter again and calls the `on_up` callbacks.

        `live_only` is for a filter whose messages must not be retained. If a client has published
        one as retained nevertheless, the broker sends it again with each connection, with MQTT's
        retain flag set. The transport drops such a message.
        """
        ...

    def unsubscribe(self, topic_filter: str) -> None:
        """Remove the handler of a filter."""
        ...

    def on_up(self, callback: Callable[[], None]) -> None:
        """Call `callback` now if the link is up, and each time that it comes up.

        Use it to announce the client. The callback runs before retained messages arrive again.
        """
        ...

    def off_up(self, callback: Callable[[], None]) -> None:
        """Remove a callback of `on_up`."""
        ...

    def close(self) -> None:
        """Disconnect regularly within a few seconds, so that the broker does not send the will."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


def dispatch(
    subscriptions: Mapping[str, Subscription], topic: str, payload: bytes, *, is_retained: bool
) -> None:
    """Call each handler whose filter covers `topic`. If one fails, log it and call the others.

    `is_retained` is the message's retain flag: the broker had stored the message.
    """
    for topic_filter, subscription in subscriptions.items():
        if not matches(topic_filter, topic):
            continue
        if is_retained and subscription.live_only:
            replay_log.warning("retained message on %r dropped; clear it at the broker", topic)
            continue
        run_guarded(partial(subscription.handler, topic, payload), f"handler of {topic_filter}")


def publish_or_log(
    transport: Transport, topic: str, payload: bytes, *, qos: int = 0, retain: bool = False
) -> None:
    """Publish a message, or log that it cannot be sent."""
    try:
        transport.publish(topic, payload, qos=qos, retain=retain)
    except LinkError as error:
        logger.warning("not sent on %s: %s", topic, error)


def run_guarded(call: Callable[[], None], name: str) -> None:
    """Run a callback. Log an exception, so that the transport's thread continues."""
    try:
        call()
    except Exception:
        logger.exception("%s failed", name)
