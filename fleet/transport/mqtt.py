"""The transport over MQTT 3.1.1 with TLS and a certificate on both sides."""

from __future__ import annotations

import logging
import math
import socket
import ssl
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Final, Self

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from fleet.errors import IdentityError, LinkError
from fleet.identity.identity import Identity
from fleet.identity.tls_errors import explain_certificate
from fleet.protocol.topics import matches
from fleet.transport.base import (
    MAX_IN_FLIGHT,
    MAX_QUEUED,
    MAX_RETAINED,
    Handler,
    Subscription,
    Transport,
    Will,
    dispatch,
    run_guarded,
)
from fleet.transport.link_log import LinkLog
from fleet.utils.host_address import host_port

KEEP_ALIVE_S: Final = 15
RECONNECT_S: Final = (1, 30)
CONNECT_S: Final = 5.0
SUBSCRIBE_S: Final = 5.0
CLOSE_S: Final = 3.0
RELOAD_S: Final = 2.0 * KEEP_ALIVE_S
RETRY_S: Final = (1.0, 60.0)
"""First and longest delay before a subscription is repeated.

A subscription is repeated if the broker refused it, or if it should bring a retained message and
none came. The reason is that a broker may learn an identity's rights only some time after the
identity has connected."""
NOT_AUTHORIZED: Final = "Not authorized"
WAKE_S: Final = 0.25

logger = logging.getLogger(__name__)


class MqttTransport(Transport):
    """A connection under an identity's name, which is also its MQTT client id and user name."""

    def __init__(self, identity: Identity, will: Will | None) -> None:
        self.name = identity.name
        self._identity = identity
        self._address = host_port(identity.config.host, identity.config.port)
        self._lock = threading.Lock()
        self._subscriptions: dict[str, Subscription] = {}
        self._callbacks: list[Callable[[], None]] = []
        self._pending_subscribes: dict[int, tuple[str, threading.Event]] = {}  # by message id
        self._refused: set[str] = set()
        self._retained: set[str] = set()  # filters that should bring a retained message
        # Filters of `_retained` for which this connection has brought no message yet.
        self._silent: set[str] = set()
        self._retry_s = RETRY_S[0]
        self._retry_timer: threading.Timer | None = None
        self._up = threading.Event()
        self._has_outcome = threading.Event()  # set at the end of the first attempt to connect
        self._has_connack = False  # whether the broker responded on this connection
        self._failure = "it did not respond"
        self._log = LinkLog(logger, self.name, self._address)
        self._is_reloading = False
        self._is_restarting = False  # from the end of a connection until the next one begins
        self._network_thread = 0
        self._newest_qos0: paho.MQTTMessageInfo | None = None
        self._unsent_qos0: deque[paho.MQTTMessageInfo] = deque()  # the oldest first
        self._unacknowledged: list[paho.MQTTMessageInfo] = []  # of QoS 1; see `_has_full_queue`
        self._closed = threading.Event()
        self._context = identity.ssl_context()
        self._context.sslsocket_class = _TlsSocket
        self._client = self._make_client(will)

    def _make_client(self, will: Will | None) -> paho.Client:
        client = paho.Client(
            CallbackAPIVersion.VERSION2, self.name, clean_session=True, protocol=paho.MQTTv311
        )
        client.username_pw_set(self.name)
        client.tls_set_context(self._context)
        client.max_inflight_messages_set(MAX_IN_FLIGHT)
        client.max_queued_messages_set(MAX_QUEUED + MAX_RETAINED)
        client.reconnect_delay_set(*RECONNECT_S)
        if will:
            client.will_set(will.topic, will.payload, qos=1, retain=True)
        client.on_pre_connect = self._on_pre_connect
        client.on_socket_open = self._on_socket_open
        client.on_connect = self._on_connect
        client.on_connect_fail = self._on_connect_fail
        client.on_disconnect = self._on_disconnect
        client.on_subscribe = self._on_subscribe
        client.on_message = self._on_message
        return client

    @classmethod
    def connect(
        cls,
        identity: Identity,
        *,
        will: Will | None = None,
        timeout_s: float = 10.0,
        wait: bool = True,
    ) -> MqttTransport:
        """Connect to the identity's broker; with ``wait=False`` return at once and keep trying.

        With ``wait=False`` the log reports why attempts fail, each reason once until the link is
        up.

        Raises:
            LinkError: only with `wait`: the broker cannot be reached, refuses the identity, or does
                not respond within `timeout_s`.
            IdentityError: the certificate does not load.
        """
        transport = cls(identity, will)
        transport._log.is_unattended = not wait
        client = transport._client
        client.connect_timeout = max(0.1, min(timeout_s, CONNECT_S))
        client.connect_async(identity.config.host, identity.config.port, keepalive=KEEP_ALIVE_S)
        client.loop_start()
        if wait:
            transport._has_outcome.wait(timeout_s)
            if not transport.is_up:
                transport.close()
                raise LinkError(
                    f"no connection to the broker at {transport._address}: {transport._failure}"
                )
        return transport

    def wait_up(self, stop: threading.Event, timeout_s: float = math.inf) -> bool:
        """Wait until the link is up, `stop` is set, or `timeout_s` seconds have passed.

        Return whether the link is up. The main thread may call this method, because signals are
        handled during the wait.
        """
        deadline = time.monotonic() + timeout_s
        while not self._up.wait(WAKE_S):
            if stop.is_set() or time.monotonic() >= deadline:
                return False
        return True

    @property
    def is_up(self) -> bool:
        return self._up.is_set()

    def publish(self, topic: str, payload: bytes, *, qos: int = 0, retain: bool = False) -> None:
        if self._closed.is_set():
            raise LinkError(f"the connection of {self.name} is closed; make a new one")
        if qos == 0 and not self.is_up:
            raise self._no_link("has no link to")
        if qos and not retain and self._has_full_queue():
            raise self._queue_full()
        if qos == 0 and self._has_full_link():
            raise self._queue_full()
        try:
            info = self._client.publish(topic, payload, qos=qos, retain=retain)
        except OSError:
            # `reload_certificate` may close paho's wake-up sockets during this call. A QoS 1
            # message is in paho's queue by then, and a QoS 0 message is lost.
            if qos:
                return
            raise self._no_link("reconnects to") from None
        if info.rc == MQTTErrorCode.MQTT_ERR_QUEUE_SIZE:
            raise self._queue_full()
        if qos == 0 and info.rc == MQTTErrorCode.MQTT_ERR_NO_CONN:
            raise self._no_link("lost its link to")
        if qos == 0:
            self._newest_qos0 = info
            self._unsent_qos0.append(info)
            return
        # Without a link, paho queues the message and also sets an error code, for which
        # `wait_for_publish` would raise an exception. Clear the code.
        info.rc = MQTTErrorCode.MQTT_ERR_SUCCESS
        with self._lock:
            self._unacknowledged.append(info)

    def _has_full_queue(self) -> bool:
        """Whether `MAX_QUEUED` QoS 1 messages or more wait for an acknowledgement.

        paho counts them, but has no public attribute for their number.
        """
        with self._lock:
            if len(self._unacknowledged) >= MAX_QUEUED:
                waiting = [info for info in self._unacknowledged if not info.is_published()]
                self._unacknowledged = waiting
            return len(self._unacknowledged) >= MAX_QUEUED

    def _has_full_link(self) -> bool:
        """Whether `MAX_QUEUED` QoS 0 messages wait for the network, as paho itself has no limit."""
        with self._lock, suppress(IndexError):
            while not _is_waiting(self._unsent_qos0[0]):
                self._unsent_qos0.popleft()
        return len(self._unsent_qos0) >= MAX_QUEUED

    def _queue_full(self) -> LinkError:
        return LinkError(
            f"{MAX_QUEUED} messages of {self.name} already wait for the broker; try later"
        )

    def _no_link(self, state: str) -> LinkError:
        return LinkError(
            f"{self.name} {state} the broker at {self._address}; send again when the link is up"
        )

    def flush(self, timeout_s: float) -> None:
        if self._newest_qos0 and threading.get_ident() != self._network_thread:
            with suppress(RuntimeError):  # the link is down
                self._newest_qos0.wait_for_publish(timeout_s)

    def subscribe(
        self,
        topic_filter: str,
        handler: Handler,
        *,
        qos: int = 0,
        retained: bool = False,
        live_only: bool = False,
    ) -> None:
        with self._lock:
            self._subscriptions[topic_filter] = Subscription(handler, qos, live_only)
            if retained:
                self._retained.add(topic_filter)
                self._silent.add(topic_filter)
        if self.is_up:
            if retained:
                self._schedule_retry()
            is_done = self._send_subscribe(topic_filter, qos)
            if threading.get_ident() != self._network_thread:
                is_done.wait(SUBSCRIBE_S)

    def unsubscribe(self, topic_filter: str) -> None:
        with self._lock:
            self._subscriptions.pop(topic_filter, None)
            for filters in (self._refused, self._retained, self._silent):
                filters.discard(topic_filter)
        # `reload_certificate` may close paho's sockets during this call. The next connection omits
        # the filter anyway.
        with suppress(OSError):
            self._client.unsubscribe(topic_filter)

    def on_up(self, callback: Callable[[], None]) -> None:
        self._callbacks.append(callback)
        if self.is_up:
            callback()

    def off_up(self, callback: Callable[[], None]) -> None:
        if callback in self._callbacks:
            self._callbacks.remove(callback)

    def reload_certificate(self) -> None:
        """Reconnect with the certificate that the identity's folder has now.

        Do not call it on the transport's own thread. The client sends a DISCONNECT packet, so the
        broker does not publish the will. QoS 1 messages that were not acknowledged are sent again
        on the new connection. A link that is down comes back with the new certificate. The call
        waits for the end of the old connection, at most `RELOAD_S` seconds, and not for the new
        one. The new one begins when the old one has ended, which may be after the call.

        Raises:
            IdentityError: the new files do not load; the connection stays as it is.
        """
        # paho accepts no second TLS context, so the new certificate is loaded into the first one.
        self._identity.load_certificate(self._context)
        with self._lock:
            if self._is_restarting or self._closed.is_set():
                return
            self._is_reloading = self.is_up
            if not self.is_up:
                return
            restart = threading.Thread(
                target=self._restart_connection, name=f"reload-{self.name}", daemon=True
            )
            restart.start()
            self._is_restarting = True
        restart.join(RELOAD_S)

    def _restart_connection(self) -> None:
        """End the connection and begin another one.

        paho accepts no second connection before its thread has ended. The thread may still write to
        a network that hangs, until `KEEP_ALIVE_S` seconds have passed, or run a handler.
        """
        self._client.disconnect()
        self._client.loop_stop()
        config = self._identity.config
        with self._lock:
            self._is_restarting = False
            if self._closed.is_set():
                return
            self._client.connect_async(config.host, config.port, keepalive=KEEP_ALIVE_S)
            _close_wakeup_sockets(self._client)
            self._client.loop_start()

    def close(self) -> None:
        with self._lock:
            if self._closed.is_set():
                return
            self._closed.set()
            if self._retry_timer:
                self._retry_timer.cancel()
        is_own_thread = threading.get_ident() == self._network_thread
        if self.is_up and self._unacknowledged and not is_own_thread:
            self._unacknowledged[-1].wait_for_publish(CLOSE_S / 2)
        self._end_connection(CLOSE_S)
        self._up.clear()

    def _end_connection(self, timeout_s: float) -> None:
        """Disconnect, and wait at most `timeout_s` seconds for the end of paho's thread."""
        self._client.disconnect()
        # `loop_stop` joins without a time limit, so it runs on a thread of its own.
        stopper = threading.Thread(
            target=self._client.loop_stop, name=f"close-{self.name}", daemon=True
        )
        stopper.start()
        if threading.get_ident() != self._network_thread:
            stopper.join(timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send_subscribe(self, topic_filter: str, qos: int) -> threading.Event:
        """Request a subscription. Return an event that the broker's acknowledgement sets."""
        is_done = threading.Event()
        with self._lock:
            try:
                _, message_id = self._client.subscribe(topic_filter, qos)
            except OSError:
                # `reload_certificate` may close paho's sockets during this call. The next
                # connection subscribes again.
                message_id = None
            if message_id is None:
                is_done.set()
            else:
                self._pending_subscribes[message_id] = (topic_filter, is_done)
        return is_done

    def _on_pre_connect(self, _client: object, _data: object) -> None:
        """Load the identity's files, which may have been renewed since the last connection."""
        try:
            self._identity.load_certificate(self._context)
        except IdentityError as error:
            text = "%s connects with its old certificate, because the new one does not load: %s"
            logger.warning(text, self.name, error)

    def _on_socket_open(self, _client: object, _data: object, sock: object) -> None:
        """Turn off Nagle's algorithm. It delays each QoS 1 message by 40 ms; paho leaves it on."""
        self._has_connack = False
        if isinstance(sock, socket.socket):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _on_connect(
        self,
        _client: object,
        _data: object,
        _flags: object,
        reason: ReasonCode,
        _properties: Properties | None,
    ) -> None:
        self._network_thread = threading.get_ident()
        self._has_connack = True
        if reason.is_failure:
            self._on_failure(self._explain_refusal(reason), needs_help=True)
            return
        if not self._is_reloading:
            self._log.connected()
        self._is_reloading = False
        self._up.set()
        with self._lock:
            self._pending_subscribes.clear()
            self._silent = set(self._retained)
            self._retry_s = RETRY_S[0]
        self._announce()
        if self._silent:
            self._schedule_retry()
        self._has_outcome.set()

    def _explain_refusal(self, reason: ReasonCode) -> str:
        if str(reason) != NOT_AUTHORIZED:
            return f"it refuses the connection ({reason})"
        return (
            f"it refuses {self.name} ({reason}); on the broker's machine see its state with "
            f"'fleet identities': 'fleet resume {self.name}' if it is suspended, else "
            f"'fleet enroll {self.name}'"
        )

    def _announce(self) -> None:
        """Subscribe to every filter and call the `on_up` callbacks."""
        with self._lock:
            filters = [(each, item.qos) for each, item in self._subscriptions.items()]
        for topic_filter, qos in filters:
            self._send_subscribe(topic_filter, qos)
        for callback in list(self._callbacks):
            run_guarded(callback, "on_up callback")

    def _on_connect_fail(self, _client: object, _data: object) -> None:
        error = sys.exc_info()[1]
        needs_help = isinstance(error, ssl.SSLCertVerificationError)
        self._on_failure(_explain(error), needs_help=needs_help)

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
        if self._closed.is_set():
            return
        if was_up and not self._is_reloading:
            self._log.lost(reason)
        elif not was_up and not self._has_connack:
            self._on_failure(
                "it closed the connection without a response; perhaps the certificate is expired, "
                f"revoked or from another fleet, {self.name} is suspended, or a clock is wrong; "
                f"check the clock, give 'fleet resume {self.name}' or enroll it again",
                needs_help=True,
            )

    def _on_failure(self, failure: str, *, needs_help: bool = False) -> None:
        self._log.failed(failure, needs_help=needs_help)
        self._failure = failure
        self._has_outcome.set()

    def _on_subscribe(
        self,
        _client: object,
        _data: object,
        message_id: int,
        reasons: list[ReasonCode],
        _properties: Properties | None,
    ) -> None:
        with self._lock:
            topic_filter, is_done = self._pending_subscribes.pop(
                message_id, ("", threading.Event())
            )
        if any(reason.is_failure for reason in reasons):
            if topic_filter not in self._refused:
                text = "the broker does not let %s subscribe to %s yet; trying again later"
                logger.warning(text, self.name, topic_filter)
            with self._lock:
                self._refused.add(topic_filter)
            self._schedule_retry()
        else:
            self._refused.discard(topic_filter)
        is_done.set()

    def _schedule_retry(self) -> None:
        with self._lock:
            if self._closed.is_set() or self._retry_timer is not None:
                return
            timer = threading.Timer(self._retry_s, self._retry_subscriptions)
            timer.daemon = True
            # If the machine has no memory for a thread, skip this retry. An exception here would
            # end paho's thread. The next refusal or connection schedules a retry again.
            with suppress(RuntimeError):
                timer.start()
                self._retry_timer = timer

    def _retry_subscriptions(self) -> None:
        with self._lock:
            self._retry_timer = None
            self._retry_s = min(1.5 * self._retry_s, RETRY_S[1])
            open_filters = (self._refused | self._silent) & self._subscriptions.keys()
            filters = [(each, self._subscriptions[each].qos) for each in open_filters]
            is_silent = bool(self._silent)
        if not self.is_up:
            return  # the next connection subscribes to every filter
        for topic_filter, qos in filters:
            self._send_subscribe(topic_filter, qos)
        if is_silent:
            self._schedule_retry()

    def _on_message(self, _client: object, _data: object, message: paho.MQTTMessage) -> None:
        try:
            topic = message.topic
        except UnicodeDecodeError:
            return
        with self._lock:
            subscriptions = dict(self._subscriptions)
            answered = {each for each in self._silent if matches(each, topic)}
            self._silent -= answered
            # A first message that is not retained, or comes only after a retry, shows that the
            # broker may have learnt the rights since the last try. It may have ignored earlier
            # subscriptions and messages, so all filters are subscribed again and the `on_up`
            # callbacks run again.
            is_late = self._retry_s > RETRY_S[0] or not message.retain
            has_new_rights = bool(answered) and is_late
            if has_new_rights:
                self._retry_s = RETRY_S[0]
        if has_new_rights:
            self._announce()
        dispatch(subscriptions, topic, bytes(message.payload), is_retained=message.retain)


class _TlsSocket(ssl.SSLSocket):
    """A socket that waits `CONNECT_S` for its handshake, and closes itself when that fails.

    paho waits `KEEP_ALIVE_S` for a handshake, and leaves the socket open when it fails. Python 3.11
    leaves it open, too, if the connection is reset before TLS begins. In this case `recv` raises
    the error, so `recv` closes the socket.
    """

    def recv(self, buflen: int = 1024, flags: int = 0) -> bytes:
        try:
            return super().recv(buflen, flags)
        except ConnectionError:
            self.close()
            raise

    def do_handshake(self, block: bool = False) -> None:
        self.settimeout(CONNECT_S)
        try:
            super().do_handshake(block)
        except OSError:
            self.close()
            raise


def _is_waiting(info: paho.MQTTMessageInfo) -> bool:
    """Whether a QoS 0 message is not on the network yet, and not lost with its connection."""
    try:
        return not info.is_published()
    except RuntimeError:  # lost
        return False


def _close_wakeup_sockets(client: paho.Client) -> None:
    """Close the pair of sockets with which other threads wake paho's thread.

    `loop_start` makes a new pair and leaves the old one open. The public methods that close the
    pair also drop the client's settings and queue. So this function calls a private method of
    paho. No other code in the project uses a private member of paho. Because of this one,
    pyproject.toml limits paho's version.
    """
    client._reset_sockets(sockpair_only=True)


def _explain(error: BaseException | None) -> str:
    """Return a text that explains a failure of the network or of TLS, and says what to do."""
    match error:
        case ssl.SSLCertVerificationError():
            return explain_certificate(error)
        case ssl.SSLError():
            return (
                f"TLS failed ({error.reason or error}); "
                "check that the port is the broker's TLS port, or enroll again"
            )
        case ConnectionRefusedError():
            return (
                "no server listens there; "
                "start it with 'fleet up', or correct host and port in identity.json"
            )
        case TimeoutError():
            return "it did not respond in time; check the network and the host in identity.json"
        case socket.gaierror():
            return "no such host; correct the host in identity.json"
        case _:
            return f"{error or 'it did not respond'}; check the network and identity.json"
