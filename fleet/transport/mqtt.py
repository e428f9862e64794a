"""The transport over MQTT 3.1.1 with TLS and a certificate on both sides."""

from __future__ import annotations

import logging
import socket
import ssl
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Final, Self

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from fleet.errors import IdentityError, LinkError
from fleet.identity.identity import Identity
from fleet.protocol.topics import matches
from fleet.transport.base import (
    MAX_QUEUED,
    MAX_RETAINED,
    Handler,
    Transport,
    Will,
    dispatch,
    guarded,
)

KEEP_ALIVE_S: Final = 15
MAX_IN_FLIGHT: Final = 100  # QoS 1 messages sent and not yet acknowledged
RECONNECT_S: Final = (1, 30)
CONNECT_S: Final = 5.0
SUBSCRIBE_S: Final = 5.0
CLOSE_S: Final = 3.0
ASK_AGAIN_S: Final = (
    1.0,
    60.0,
)  # for a subscription that was refused, or brought nothing: rights may come later
NOT_AUTHORIZED: Final = "Not authorized"
NOT_YET_VALID: Final = 9  # X509_V_ERR_CERT_NOT_YET_VALID of OpenSSL

logger = logging.getLogger(__name__)


class MqttTransport(Transport):
    """A connection under an identity's name, which is also its MQTT client id and user name."""

    def __init__(self, identity: Identity, will: Will | None) -> None:
        self.name = identity.name
        self._identity = identity
        self._where = f"{identity.config.host}:{identity.config.port}"
        self._lock = threading.Lock()
        self._subscriptions: dict[str, tuple[Handler, int]] = {}
        self._callbacks: list[Callable[[], None]] = []
        self._granted: dict[int, tuple[str, threading.Event]] = {}
        self._refused: set[str] = set()
        self._retained: set[str] = set()  # filters under which something is retained
        self._silent: set[str] = set()  # those of them that have brought nothing on this connection
        self._ask_again_s = ASK_AGAIN_S[0]
        self._asking_again: threading.Timer | None = None
        self._up = threading.Event()
        self._answered = threading.Event()
        self._heard = False  # whether this connection got its CONNACK
        self._trouble = "it did not answer"
        self._network_thread = 0
        self._newest: paho.MQTTMessageInfo | None = None  # with QoS 0
        self._last: paho.MQTTMessageInfo | None = None  # with QoS 1
        self._closed = threading.Event()
        client = paho.Client(
            CallbackAPIVersion.VERSION2, self.name, clean_session=True, protocol=paho.MQTTv311
        )
        client.username_pw_set(self.name)
        self._context = identity.ssl_context()
        self._context.sslsocket_class = _TlsSocket
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
        self._client = client

    @classmethod
    def connect(
        cls,
        identity: Identity,
        *,
        will: Will | None = None,
        timeout_s: float = 10.0,
        wait: bool = True,
    ) -> MqttTransport:
        """Connects to the identity's broker; with ``wait=False`` returns at once and keeps trying.

        Raises:
            LinkError: the broker cannot be reached, or refuses us, or does not answer within `timeout_s`.
            IdentityError: the certificate does not load.
        """
        transport = cls(identity, will)
        client = transport._client
        client.connect_timeout = max(0.1, min(timeout_s, CONNECT_S))
        client.connect_async(identity.config.host, identity.config.port, keepalive=KEEP_ALIVE_S)
        client.loop_start()
        if wait:
            transport._answered.wait(timeout_s)
            if not transport.is_up:
                transport.close()
                raise LinkError(
                    f"no connection to the broker at {transport._where}: {transport._trouble}"
                )
        return transport

    @property
    def is_up(self) -> bool:
        return self._up.is_set()

    def publish(self, topic: str, payload: bytes, *, qos: int = 0, retain: bool = False) -> None:
        if self._closed.is_set():
            raise LinkError(f"{self.name} is closed; connect again")
        if qos == 0 and not self.is_up:
            raise LinkError(
                f"{self.name} has no link to the broker at {self._where}; send again when it is up"
            )
        if qos and not retain and len(self._client._out_messages) >= MAX_QUEUED:
            raise self._full()
        try:
            info = self._client.publish(topic, payload, qos=qos, retain=retain)
        except (
            OSError
        ):  # a renewal replaces the sockets that wake paho's thread; it keeps QoS 1 all the same
            if qos:
                return
            raise LinkError(
                f"{self.name} connects anew to the broker at {self._where}; send again"
            ) from None
        if info.rc == MQTTErrorCode.MQTT_ERR_QUEUE_SIZE:
            raise self._full()
        if qos == 0 and info.rc == MQTTErrorCode.MQTT_ERR_NO_CONN:
            raise LinkError(
                f"{self.name} lost its link to the broker at {self._where}; send again when it is up"
            )
        if qos == 0:
            self._newest = info
        else:
            info.rc = (
                MQTTErrorCode.MQTT_ERR_SUCCESS
            )  # paho keeps it, and would not let us wait for it otherwise
            self._last = info

    def _full(self) -> LinkError:
        return LinkError(
            f"{MAX_QUEUED} messages of {self.name} wait for the broker already; try later"
        )

    def flush(self, timeout_s: float) -> None:
        if self._newest and threading.get_ident() != self._network_thread:
            with suppress(RuntimeError):  # the link has gone
                self._newest.wait_for_publish(timeout_s)

    def subscribe(
        self, topic_filter: str, handler: Handler, *, qos: int = 0, retained: bool = False
    ) -> None:
        with self._lock:
            self._subscriptions[topic_filter] = (handler, qos)
            if retained:
                self._retained.add(topic_filter)
                self._silent.add(topic_filter)
        if self.is_up:
            if retained:
                self._ask_again_later()
            granted = self._request(topic_filter, qos)
            if threading.get_ident() != self._network_thread:
                granted.wait(SUBSCRIBE_S)

    def unsubscribe(self, topic_filter: str) -> None:
        with self._lock:
            self._subscriptions.pop(topic_filter, None)
            for some in (self._refused, self._retained, self._silent):
                some.discard(topic_filter)
        with suppress(OSError):  # as in `publish`; the next connection does not subscribe to it
            self._client.unsubscribe(topic_filter)

    def on_up(self, callback: Callable[[], None]) -> None:
        self._callbacks.append(callback)
        if self.is_up:
            callback()

    def off_up(self, callback: Callable[[], None]) -> None:
        if callback in self._callbacks:
            self._callbacks.remove(callback)

    def renew(self) -> None:
        """Connects anew with the certificate that the identity's folder has now; not for the transport's own thread.

        In good order, so that no will is sent; what waits for an acknowledgement is sent again. A link that is down
        comes back with the new certificate by itself. Waits for nobody's answer, but for the end of a network that
        hangs, which keep-alive notices, at most twice `KEEP_ALIVE_S` seconds.

        Raises:
            IdentityError: the new files do not load; the connection stays as it is.
        """
        self._identity.load_certificate(
            self._context
        )  # paho takes no second context, but this one may change
        if not self.is_up:
            return
        if not self._end_connection(2 * KEEP_ALIVE_S) or self._closed.is_set():
            return
        config = self._identity.config
        self._client.connect_async(config.host, config.port, keepalive=KEEP_ALIVE_S)
        self._client._reset_sockets(
            sockpair_only=True
        )  # the loop makes new ones, and would leave these open
        self._client.loop_start()

    def close(self) -> None:
        if self._closed.is_set():
            return
        self._closed.set()
        with self._lock:
            if self._asking_again:
                self._asking_again.cancel()
        if self.is_up and self._last and threading.get_ident() != self._network_thread:
            self._last.wait_for_publish(CLOSE_S / 2)
        self._end_connection(CLOSE_S)
        self._up.clear()

    def _end_connection(self, timeout_s: float) -> bool:
        """Says goodbye to the broker; whether paho's thread has ended, too, within `timeout_s`."""
        self._client.disconnect()
        # A network that hangs must not hold up whoever closes: paho's own join has no limit.
        stopper = threading.Thread(
            target=self._client.loop_stop, name=f"close-{self.name}", daemon=True
        )
        stopper.start()
        if threading.get_ident() != self._network_thread:
            stopper.join(timeout_s)
        return not stopper.is_alive()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _request(self, topic_filter: str, qos: int) -> threading.Event:
        """Asks the broker for a subscription; the event is set by its answer."""
        with self._lock:
            try:
                _, mid = self._client.subscribe(topic_filter, qos)
            except OSError:  # as in `publish`; the next connection subscribes to all
                mid = None
            granted = threading.Event()
            if mid is None:
                granted.set()
            else:
                self._granted[mid] = topic_filter, granted
        return granted

    def _on_pre_connect(self, _client: object, _data: object) -> None:
        """Whoever renewed the files meanwhile, the next connection is made with what they hold."""
        try:
            self._identity.load_certificate(self._context)
        except IdentityError as error:
            logger.warning("%s connects with the certificate that it had: %s", self.name, error)

    def _on_socket_open(self, _client: object, _data: object, sock: object) -> None:
        """paho leaves Nagle's algorithm on, which costs 40 ms a QoS 1 message."""
        self._heard = False
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
        self._heard = True
        if reason.is_failure:
            self._fail(
                f"it refuses {self.name} ({reason}); enroll it with 'fleet enroll {self.name}' on the broker's machine"
                if str(reason) == NOT_AUTHORIZED
                else f"it refuses the connection ({reason})"
            )
            return
        self._up.set()
        with self._lock:
            self._granted.clear()
            self._silent = set(self._retained)
            self._ask_again_s = ASK_AGAIN_S[0]
        self._begin()
        if self._silent:
            self._ask_again_later()
        self._answered.set()

    def _begin(self) -> None:
        """What a connection begins with."""
        with self._lock:
            filters = [
                (topic_filter, qos) for topic_filter, (_, qos) in self._subscriptions.items()
            ]
        for topic_filter, qos in filters:
            self._request(topic_filter, qos)
        for callback in list(self._callbacks):
            guarded(callback, "on_up callback")

    def _on_connect_fail(self, _client: object, _data: object) -> None:
        self._fail(_explain(sys.exc_info()[1]))

    def _on_disconnect(
        self,
        _client: object,
        _data: object,
        _flags: object,
        reason: ReasonCode,
        _properties: Properties | None,
    ) -> None:
        was_up = self.is_up
        heard = self._heard
        self._up.clear()
        if self._closed.is_set():
            return
        if was_up:
            logger.info(
                "%s lost its link to the broker at %s (%s); connecting again",
                self.name,
                self._where,
                reason,
            )
        elif not heard:
            self._fail(
                "it closed the connection before it answered, as it does when our certificate is not of its fleet, "
                f"has expired or was revoked; enroll {self.name} again"
            )

    def _fail(self, trouble: str) -> None:
        if not self._answered.is_set() or trouble != self._trouble:
            logger.info(
                "no connection of %s to the broker at %s: %s", self.name, self._where, trouble
            )
        self._trouble = trouble
        self._answered.set()

    def _on_subscribe(
        self,
        _client: object,
        _data: object,
        mid: int,
        reasons: list[ReasonCode],
        _properties: Properties | None,
    ) -> None:
        with self._lock:
            topic_filter, granted = self._granted.pop(mid, ("", threading.Event()))
        if any(reason.is_failure for reason in reasons):
            if topic_filter not in self._refused:
                text = "the broker does not let %s read %s; asking again until it does"
                logger.warning(text, self.name, topic_filter)
            with self._lock:
                self._refused.add(topic_filter)
            self._ask_again_later()
        else:
            self._refused.discard(topic_filter)
        granted.set()

    def _ask_again_later(self) -> None:
        with self._lock:
            if not self._closed.is_set() and self._asking_again is None:
                timer = threading.Timer(self._ask_again_s, self._ask_again)
                timer.daemon = True
                with suppress(
                    RuntimeError
                ):  # no thread to be had, on paho's own, which must go on: later, then
                    timer.start()
                    self._asking_again = timer

    def _ask_again(self) -> None:
        with self._lock:
            self._asking_again = None
            self._ask_again_s = min(1.5 * self._ask_again_s, ASK_AGAIN_S[1])
            wanted = (self._refused | self._silent) & self._subscriptions.keys()
            filters = [(each, self._subscriptions[each][1]) for each in wanted]
            still_silent = bool(self._silent)
        if not self.is_up:
            return  # the next connection asks for all
        for topic_filter, qos in filters:
            self._request(topic_filter, qos)
        if still_silent:
            self._ask_again_later()

    def _on_message(self, _client: object, _data: object, message: paho.MQTTMessage) -> None:
        try:
            topic = message.topic
        except UnicodeDecodeError:
            return
        with self._lock:
            handlers = [
                (topic_filter, handler)
                for topic_filter, (handler, _) in self._subscriptions.items()
            ]
            heard = {each for each in self._silent if matches(each, topic)}
            self._silent -= heard
            rights_have_come = (
                bool(heard) and self._ask_again_s > ASK_AGAIN_S[0]
            )  # only after it was asked again
            if rights_have_come:
                self._ask_again_s = ASK_AGAIN_S[0]
        if rights_have_come:
            self._begin()
        dispatch(handlers, topic, bytes(message.payload))


class _TlsSocket(ssl.SSLSocket):
    """paho waits `KEEP_ALIVE_S` for a handshake, and leaves the socket open when it fails; so does Python 3.11 when the
    connection was reset before TLS began, which shows in a `recv`."""

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


def _explain(error: BaseException | None) -> str:
    """What went wrong below MQTT, and the next step."""
    match error:
        case ssl.SSLCertVerificationError(verify_code=code) if code == NOT_YET_VALID:
            return "its certificate is not valid yet by this machine's clock, which seems to be behind; set the clock"
        case ssl.SSLCertVerificationError():
            return f"its certificate is not what we trust ({error.verify_message}); enroll again to get its CA"
        case ssl.SSLError():
            return f"TLS failed ({error.reason or error}); check that the port is the broker's TLS port, or enroll again"
        case ConnectionRefusedError():
            return "nothing listens there; start it with 'fleet up', or correct host and port in identity.json"
        case TimeoutError():
            return "it did not answer in time; check the network and the host in identity.json"
        case socket.gaierror():
            return "no such host; correct the host in identity.json"
        case _:
            return f"{error or 'it did not answer'}; check the network and identity.json"
