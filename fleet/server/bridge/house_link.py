"""The connection to a house's broker, over MQTT 5."""

from __future__ import annotations

import logging
import ssl
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Final, Self

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from fleet.protocol.prompt import MAX_PROMPT_BYTES
from fleet.protocol.topics import matches
from fleet.server.bridge.bridge_options import HouseAddress
from fleet.transport.base import run_guarded
from fleet.transport.link_log import LinkLog
from fleet.utils.host_address import host_port
from fleet.utils.rate_limited_log import RateLimitedLog

HouseHandler = Callable[[str, bytes, bool], None]  # topic, payload, whether it was retained

KEEP_ALIVE_S: Final = 15
RECONNECT_S: Final = (1, 60)
CLOSE_S: Final = 3.0
MAX_WAITING: Final = 100  # answers that wait for the link
MAX_HOUSE_PACKET: Final = MAX_PROMPT_BYTES + 4096
"""The largest packet in bytes: a broker of MQTT 5 does not send larger ones (section 3.1.2.11)."""

logger = logging.getLogger(__name__)
log = RateLimitedLog(logger, 10.0)


class HouseLink:
    """A context manager that connects, and again with back-off when the broker goes away.

    Each connection subscribes to the filters of `handlers`, and then calls `on_up`. Both are called
    on the link's own thread. `will_topic` gets the retained payload `will` when the link breaks.
    """

    def __init__(
        self,
        address: HouseAddress,
        name: str,
        handlers: Mapping[str, HouseHandler],
        on_up: Callable[[], None],
        *,
        will_topic: str,
        will: bytes,
    ) -> None:
        self._address = address
        self._handlers = handlers
        self._on_up = on_up
        self._will = (will_topic, will)
        self._up = threading.Event()
        self._has_connack = False
        self._log = LinkLog(logger, name, host_port(address.host, address.broker_port))
        self._log.is_unattended = True
        self._client = self._make_client()

    def _make_client(self) -> paho.Client:
        client = paho.Client(CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
        if self._address.user is not None:
            client.username_pw_set(self._address.user, self._address.password())
        context = self._address.tls_context()
        if context:
            client.tls_set_context(context)
        client.will_set(*self._will, qos=1, retain=True)
        client.max_queued_messages_set(MAX_WAITING)
        client.reconnect_delay_set(*RECONNECT_S)
        client.on_socket_open = self._on_socket_open
        client.on_connect = self._on_connect
        client.on_connect_fail = self._on_connect_fail
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        client.on_publish = self._on_publish
        return client

    @property
    def is_up(self) -> bool:
        """Whether the link is up."""
        return self._up.is_set()

    def __enter__(self) -> Self:
        self._client.connect_async(
            self._address.host,
            self._address.broker_port,
            keepalive=KEEP_ALIVE_S,
            properties=_one_property(PacketTypes.CONNECT, "MaximumPacketSize", MAX_HOUSE_PACKET),
        )
        self._client.loop_start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_up:
            topic, payload = self._will
            last = self._client.publish(topic, payload, qos=1, retain=True)
            with suppress(RuntimeError):  # the link is down now
                last.wait_for_publish(CLOSE_S)
        self._client.disconnect()
        # `loop_stop` joins without a time limit, so it runs on a thread of its own.
        stopper = threading.Thread(target=self._client.loop_stop, name="close-house", daemon=True)
        stopper.start()
        stopper.join(CLOSE_S)

    def publish_state(self, topic: str, payload: bytes) -> bool:
        """Publish a retained message; return False if it cannot be sent now, and is dropped."""
        if not self.is_up:
            return False
        info = self._client.publish(topic, payload, qos=1, retain=True)
        return info.rc == MQTTErrorCode.MQTT_ERR_SUCCESS

    def publish_once(self, topic: str, payload: bytes) -> None:
        """Publish a message that is not retained.

        While the link is down, `MAX_WAITING` messages wait, and others are lost.
        """
        info = self._client.publish(topic, payload, qos=1)
        if info.rc == MQTTErrorCode.MQTT_ERR_QUEUE_SIZE:
            log.warning("a message on %r is lost: %d already wait", topic, MAX_WAITING)

    def _on_socket_open(self, _client: object, _data: object, _socket: object) -> None:
        self._has_connack = False

    def _on_connect(
        self,
        client: paho.Client,
        _data: object,
        _flags: object,
        reason: ReasonCode,
        _properties: Properties | None,
    ) -> None:
        self._has_connack = True
        if reason.is_failure:
            self._log.failed(f"it refuses the connection ({reason})", needs_help=True)
            return
        self._log.connected()
        self._up.set()
        for number, topic_filter in enumerate(self._handlers, start=1):
            properties = _one_property(PacketTypes.SUBSCRIBE, "SubscriptionIdentifier", number)
            client.subscribe(topic_filter, options=SubscribeOptions(qos=1), properties=properties)
        run_guarded(self._on_up, "announcement to the house")

    def _on_connect_fail(self, _client: object, _data: object) -> None:
        error = sys.exc_info()[1]
        is_untrusted = isinstance(error, ssl.SSLCertVerificationError)
        self._log.failed(str(error) or "it did not respond", needs_help=is_untrusted)

    def _on_disconnect(
        self,
        _client: object,
        _data: object,
        _flags: object,
        reason: ReasonCode,
        _properties: Properties | None,
    ) -> None:
        was_up = self.is_up
        self._up.clear()
        if was_up and reason.value:
            self._log.lost(reason)
        elif not was_up and not self._has_connack:
            text = "it closed the connection without a response; expected a broker of MQTT 5"
            self._log.failed(text, needs_help=True)

    def _on_publish(
        self,
        _client: object,
        _data: object,
        _message_id: int,
        reason: ReasonCode,
        _properties: Properties | None,
    ) -> None:
        if reason.is_failure:
            text = "the house's broker refuses a message (%s); allow the bridge to write its topics"
            log.warning(text, reason)

    def _on_message(self, _client: object, _data: object, message: paho.MQTTMessage) -> None:
        try:
            topic = message.topic
        except UnicodeDecodeError:
            return
        for number, (topic_filter, handler) in enumerate(self._handlers.items(), start=1):
            if matches(topic_filter, topic):
                numbers = _subscriptions_of(message)
                if not numbers or number in numbers:
                    call = partial(handler, topic, bytes(message.payload), message.retain)
                    run_guarded(call, f"handler of {topic_filter}")
                return


def _one_property(packet: int, name: str, value: int) -> Properties:
    properties = Properties(packet)  # type: ignore[no-untyped-call]
    setattr(properties, name, value)
    return properties


def _subscriptions_of(message: paho.MQTTMessage) -> Sequence[int]:
    """Return the numbers of the subscriptions that a message is for; empty if none came with it.

    A broker may send a message once for each of several filters that match (MQTT 5 section 3.3.4).
    """
    numbers: Sequence[int] = getattr(message.properties, "SubscriptionIdentifier", ())
    return numbers
