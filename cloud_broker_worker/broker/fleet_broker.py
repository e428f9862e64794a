"""The fleet's broker on amqtt: admission, rights and limits.

amqtt 0.12.1 deletes, or hands over, the session of a claimed client id before it calls its plugins;
sends a new client the retained messages of all clients' subscriptions; publishes a will on any
topic; never ends a silent connection; accepts packets of 256 MB; and keeps every message for a slow
client in memory. So this module handles a connection from CONNECT to its will; amqtt provides the
listener, the packets, the subscriptions and the retained messages.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from typing import Final

from amqtt.broker import Broker
from amqtt.contexts import Action as MqttAction
from amqtt.contexts import BrokerConfig, ListenerConfig
from amqtt.mqtt.connack import CONNECTION_ACCEPTED, NOT_AUTHORIZED, ConnackPacket
from amqtt.mqtt.puback import PubackPacket
from amqtt.mqtt.publish import PublishPacket
from amqtt.mqtt.suback import SubackPacket
from amqtt.mqtt.subscribe import SubscribePacket
from amqtt.mqtt.unsuback import UnsubackPacket
from amqtt.mqtt.unsubscribe import UnsubscribePacket
from amqtt.session import Session

from cloud_broker_worker.broker.admission import ConnectRefusal, admit, certificate_holder
from cloud_broker_worker.broker.connection import Connection
from cloud_broker_worker.broker.packets import read_packet
from cloud_broker_worker.broker.rights_cache import RightsCache
from fleet.errors import DecodeError, ProtocolError
from fleet.protocol import topics
from fleet.protocol.access import Action
from fleet.protocol.topics import matches

CONNECT_S: Final = 10.0
CLOSE_S: Final = 2.0
REVOCATION_S: Final = 1.0  # period of the check; cached rights are up to two seconds old
MAX_CONNECT_BYTES: Final = 64 * 1024
MAX_QOS: Final = 1
MAX_FILTERS: Final = 100  # subscriptions of one connection
MAX_CONNECTIONS_PER_NAME: Final = 16
MAX_ROUTES: Final = 10_000
MAX_TOPIC_BYTES: Final = 256
RETAINED: Final = (
    topics.DEVICE_STATUS_FILTER,
    topics.DEVICE_CONFIG_FILTER,
    topics.WORKER_STATUS_FILTER,
    topics.REVOKED,
)
"""Filters of retained messages. On other topics, which have no limit in number, none is kept."""
REFUSED: Final = 0x80

logger = logging.getLogger(__name__)


class FleetBroker(Broker):
    """A broker on which certificate, client id and user name have one name, with its `rights`."""

    def __init__(self, listener: socket.socket, tls: ssl.SSLContext, rights: RightsCache) -> None:
        super().__init__(
            BrokerConfig(listeners={"default": ListenerConfig(bind="127.0.0.1:0")}, plugins={})
        )
        self._socket = listener
        self._tls = tls
        self._rights = rights
        self._writers: set[asyncio.StreamWriter] = set()
        self._routes: dict[str, dict[str, int]] = {}  # QoS by topic and client id; a cache

    async def stream_connected(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        listener_name: str,  # noqa: ARG002
    ) -> None:
        """Serve one connection from CONNECT to its will."""
        self._writers.add(writer)
        connection = None
        try:
            # asyncio does this only for sockets with an explicit protocol number, which accepted
            # ones lack.
            writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = await self._admit(reader, writer)
            if connection and await connection.serve(self):
                connection.session.will_flag = False
        except (ProtocolError, OSError) as error:  # TimeoutError and SSLError are OSErrors
            text = "connection of %s ended: %s"
            logger.info(text, _label(connection, writer), str(error) or type(error).__name__)
        except Exception:
            logger.exception("connection of %s ended", _label(connection, writer))
        finally:
            if connection:
                await self._end_session(connection)
            self._writers.discard(writer)
            writer.close()

    async def on_publish(self, connection: Connection, packet: PublishPacket) -> None:
        """Acknowledge a client's message, then publish it if the client has the right."""
        topic = packet.topic_name
        qos = packet.qos
        if qos > MAX_QOS or len(topic.encode()) > MAX_TOPIC_BYTES:
            raise DecodeError(
                f"expected QoS 0 or 1 and a topic of at most {MAX_TOPIC_BYTES} bytes, got QoS {qos}"
            )
        if qos:
            connection.send(PubackPacket.build(packet.variable_header.packet_id))
        if not self._is_live(connection):
            return
        if self._rights.permits(connection.holder, Action.PUBLISH, topic):
            await self._publish(topic, packet.data, qos, retain=packet.retain_flag)
        else:
            logger.info("%s may not publish to %s", connection.name, topic[:200])

    async def on_subscribe(self, connection: Connection, packet: SubscribePacket) -> None:
        """Add the filters that the client may read, and send their retained messages."""
        filters = packet.payload.topics
        codes = [await self._add_filter(connection, *subscription) for subscription in filters]
        connection.send(SubackPacket.build(packet.variable_header.packet_id, codes))
        for (topic_filter, _), code in zip(filters, codes, strict=True):
            if code != REFUSED:
                self._send_retained(connection, topic_filter, code)

    def _send_retained(self, connection: Connection, topic_filter: str, granted_qos: int) -> None:
        for message in self._retained_messages.values():
            if matches(topic_filter, message.topic):
                qos = min(granted_qos, message.qos)
                connection.deliver(message.topic, bytes(message.data), qos, retain=True)

    async def on_unsubscribe(self, connection: Connection, packet: UnsubscribePacket) -> None:
        """Remove filters."""
        for topic_filter in packet.payload.topics:
            self._del_subscription(topic_filter, connection.session)
            connection.filters.discard(topic_filter)
            if not self._subscriptions.get(topic_filter, True):
                del self._subscriptions[topic_filter]
        self._routes.clear()
        connection.send(UnsubackPacket.build(packet.variable_header.packet_id))

    async def shutdown(self) -> None:
        """Close every connection without its will, then the listener."""
        self._sessions.clear()
        for writer in list(self._writers):
            writer.transport.abort()
        await super().shutdown()

    async def _admit(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> Connection | None:
        """Read CONNECT and answer it with CONNACK; return the connection of an admitted client."""
        async with asyncio.timeout(CONNECT_S):
            packet = await read_packet(reader, MAX_CONNECT_BYTES)
        holder = certificate_holder(writer.get_extra_info("ssl_object"))
        session = admit(packet, holder, self._rights)
        if isinstance(session, Session) and holder and self._has_too_many(holder.name, session):
            reason = f"{holder.name!r} has {MAX_CONNECTIONS_PER_NAME} connections already"
            session = ConnectRefusal(NOT_AUTHORIZED, reason)
        if isinstance(session, ConnectRefusal):
            peer = writer.get_extra_info("peername")
            logger.warning("a connection from %s is refused: %s", peer, session.reason)
            writer.write(ConnackPacket.build(0, session.code).to_bytes())
            return None
        assert holder is not None  # `admit` refuses a client without one
        await self._end_predecessor(session.client_id)
        connection = Connection(holder, session, reader, writer)
        self._sessions[session.client_id] = (session, connection)
        connection.send(ConnackPacket.build(0, CONNECTION_ACCEPTED))
        return connection

    async def _end_predecessor(self, client_id: str) -> None:
        """End an older session of the client id, without its will."""
        if client_id in self._sessions:
            session, connection = self._sessions[client_id]
            session.will_flag = False
            await self._end_session(connection)
            await connection.stop()

    async def _end_session(self, connection: Connection) -> None:
        """End a session, with its will if it still has one, unless a successor ended it before."""
        if not self._is_live(connection):
            return
        session = connection.session
        del self._sessions[session.client_id]
        await self._del_all_subscriptions(session)
        self._routes.clear()
        topic = session.will_topic
        if session.will_flag and self._rights.permits(connection.holder, Action.PUBLISH, topic):
            qos = min(session.will_qos, MAX_QOS)
            await self._publish(topic, session.will_message, qos, retain=session.will_retain)

    async def _publish(self, topic: str, payload: bytes, qos: int, *, retain: bool) -> None:
        """Deliver a message. It never waits, so each subscriber gets messages in their order."""
        if retain and any(matches(each, topic) for each in RETAINED):
            await self.retain_message(None, topic, payload, qos)
        for client_id, granted_qos in self._route(topic).items():
            _, connection = self._sessions[client_id]
            if self._rights.permits(connection.holder, Action.SUBSCRIBE, topic):
                connection.deliver(topic, payload, min(qos, granted_qos))

    def _route(self, topic: str) -> dict[str, int]:
        """Return the highest QoS of each client id that subscribed to `topic`."""
        if topic in self._routes:
            return self._routes[topic]
        route: dict[str, int] = {}
        for topic_filter, subscriptions in self._subscriptions.items():
            if matches(topic_filter, topic):
                for session, qos in subscriptions:
                    route[session.client_id] = max(qos, route.get(session.client_id, 0))
        if len(self._routes) >= MAX_ROUTES:
            self._routes.clear()
        self._routes[topic] = route
        return route

    async def _add_filter(self, connection: Connection, topic_filter: str, qos: int) -> int:
        """Add a subscription; return its granted QoS, or `REFUSED`."""
        if len(connection.filters | {topic_filter}) > MAX_FILTERS or not self._is_live(connection):
            return REFUSED
        subscription = (topic_filter, min(qos, MAX_QOS))
        code: int = await self.add_subscription(subscription, connection.session)
        if code == REFUSED:
            logger.info("%s may not subscribe to %s", connection.name, topic_filter[:200])
        else:
            connection.filters.add(topic_filter)
            self._routes.clear()
        return code

    async def _topic_filtering(
        self,
        session: Session,
        topic: str,
        action: MqttAction,  # noqa: ARG002
    ) -> bool:
        """Decide on a subscription for amqtt.

        A shared one would be granted and never deliver: MQTT 3.1.1 has none.
        """
        _, connection = self._sessions[session.client_id]
        return not topic.startswith("$") and self._rights.permits(
            connection.holder, Action.SUBSCRIBE, topic
        )

    async def _session_monitor(self) -> None:
        """Disconnect identities that are no longer active, or whose certificate was revoked."""
        while True:
            await asyncio.sleep(REVOCATION_S)
            for _, connection in list(self._sessions.values()):
                if self._rights.get(connection.holder) is None:
                    connection.abort("is no longer enrolled, or its certificate was revoked")

    async def _create_server_instance(self, *_: object) -> asyncio.Server:
        """Create the server on the listener of the constructor."""
        return await asyncio.start_server(
            lambda reader, writer: self.stream_connected(reader, writer, "default"),
            sock=self._socket,
            ssl=self._tls,
            ssl_handshake_timeout=CONNECT_S,
            ssl_shutdown_timeout=CLOSE_S,
        )

    def _is_live(self, connection: Connection) -> bool:
        return self._sessions.get(connection.session.client_id, (None, None))[1] is connection

    def _has_too_many(self, name: str, session: Session) -> bool:
        num_connections = sum(connection.name == name for _, connection in self._sessions.values())
        is_new = session.client_id not in self._sessions
        return is_new and num_connections >= MAX_CONNECTIONS_PER_NAME


def _label(connection: Connection | None, writer: asyncio.StreamWriter) -> str:
    """Return a connection's client id, or the peer's address before its admission."""
    return str(connection.session.client_id if connection else writer.get_extra_info("peername"))
