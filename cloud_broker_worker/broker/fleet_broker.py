"""amqtt's broker with its doors closed.

amqtt 0.12.1 deletes, or hands over, the session of a claimed client id before it asks its plugins; sends a new client
the retained messages of everybody's subscriptions; publishes a will wherever it says; never ends a silent connection;
takes packets of 256 MB; and keeps every message for a slow client in memory. So a connection's life is ours, from
CONNECT to its will; amqtt gives the listener, the packets, the subscriptions and the retained messages.
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

from cloud_broker_worker.broker.admission import ConnectRefusal, admit, holder_of
from cloud_broker_worker.broker.connection import Connection
from cloud_broker_worker.broker.packets import read_packet
from cloud_broker_worker.broker.rights_cache import RightsCache
from fleet.errors import DecodeError, ProtocolError
from fleet.protocol import topics
from fleet.protocol.access import Action
from fleet.protocol.topics import matches

CONNECT_S: Final = 10.0
CLOSE_S: Final = 2.0
REVOCATION_S: Final = 1.0  # and what is known of a name is two seconds old at the most
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
"""What is kept. Other messages are delivered only: a client can think of any number of topics for them."""
REFUSED: Final = 0x80

logger = logging.getLogger(__name__)


class FleetBroker(Broker):
    """A client's certificate, client id and user name are one name, and `rights` says what that may do."""

    def __init__(self, listener: socket.socket, tls: ssl.SSLContext, rights: RightsCache) -> None:
        super().__init__(
            BrokerConfig(listeners={"default": ListenerConfig(bind="127.0.0.1:0")}, plugins={})
        )
        self._socket = listener
        self._tls = tls
        self._rights = rights
        self._writers: set[asyncio.StreamWriter] = set()
        self._routes: dict[
            str, dict[str, int]
        ] = {}  # topic -> client id -> QoS, as far as it was asked

    async def stream_connected(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        listener_name: str,  # noqa: ARG002
    ) -> None:
        """One connection's whole life."""
        self._writers.add(writer)
        connection = None
        try:
            # asyncio does this itself only for sockets whose protocol number was named, which an accepted one's is not.
            writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = await self._let_in(reader, writer)
            if connection and await connection.serve(self):
                connection.session.will_flag = False
        except (ProtocolError, OSError) as error:  # TimeoutError and SSLError are of the latter
            who = connection.session.client_id if connection else writer.get_extra_info("peername")
            logger.info("connection of %s ended: %s", who, str(error) or type(error).__name__)
        except Exception:
            logger.exception(
                "connection of %s ended",
                connection.session.client_id if connection else "a stranger",
            )
        finally:
            if connection:
                await self._forget(connection)
            self._writers.discard(writer)
            writer.close()

    async def take(self, connection: Connection, packet: PublishPacket) -> None:
        """A message of a client: acknowledged, then passed on where its sender may publish, else dropped."""
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
        if self._rights.may(connection.holder, Action.PUBLISH, topic):
            await self._publish(topic, packet.data, qos, retain=packet.retain_flag)
        else:
            logger.info("%s may not publish to %s", connection.name, topic[:200])

    async def subscribe(self, connection: Connection, packet: SubscribePacket) -> None:
        filters = packet.payload.topics
        codes = [
            await self._add_filter(connection, topic_filter, qos) for topic_filter, qos in filters
        ]
        connection.send(SubackPacket.build(packet.variable_header.packet_id, codes))
        for (topic_filter, _), code in zip(filters, codes, strict=True):
            for retained in self._retained_messages.values() if code != REFUSED else ():
                if matches(topic_filter, retained.topic):
                    connection.deliver(
                        retained.topic, bytes(retained.data), min(code, retained.qos), retain=True
                    )

    async def unsubscribe(self, connection: Connection, packet: UnsubscribePacket) -> None:
        for topic_filter in packet.payload.topics:
            self._del_subscription(topic_filter, connection.session)
            connection.filters.discard(topic_filter)
            if not self._subscriptions.get(topic_filter, True):
                del self._subscriptions[topic_filter]
        self._routes.clear()
        connection.send(UnsubackPacket.build(packet.variable_header.packet_id))

    async def shutdown(self) -> None:
        """Closes every connection without its will, then the listener."""
        self._sessions.clear()
        for writer in list(self._writers):
            writer.transport.abort()
        await super().shutdown()

    async def _let_in(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> Connection | None:
        async with asyncio.timeout(CONNECT_S):
            packet = await read_packet(reader, MAX_CONNECT_BYTES)
        holder = holder_of(writer.get_extra_info("ssl_object"))
        session = admit(packet, holder, self._rights)
        if (
            isinstance(session, Session)
            and holder
            and self._is_one_too_many(session.client_id, holder.name)
        ):
            session = ConnectRefusal(
                NOT_AUTHORIZED,
                f"{holder.name!r} has {MAX_CONNECTIONS_PER_NAME} connections already",
            )
        if isinstance(session, ConnectRefusal):
            logger.warning(
                "a connection from %s is refused: %s",
                writer.get_extra_info("peername"),
                session.reason,
            )
            writer.write(ConnackPacket.build(0, session.code).to_bytes())
            return None
        assert holder is not None  # nobody is admitted without
        await self._take_over(session.client_id)
        connection = Connection(holder, session, reader, writer)
        self._sessions[session.client_id] = (session, connection)
        connection.send(ConnackPacket.build(0, CONNECTION_ACCEPTED))
        return connection

    async def _take_over(self, client_id: str) -> None:
        """Ends what this client left behind, without its will: its successor is here."""
        if client_id in self._sessions:
            session, connection = self._sessions[client_id]
            session.will_flag = False
            await self._forget(connection)
            await connection.stop()

    async def _forget(self, connection: Connection) -> None:
        """Ends a session, with its will if it still has one, unless a successor ended it before."""
        if self._is_live(connection):
            session = connection.session
            del self._sessions[session.client_id]
            await self._del_all_subscriptions(session)
            self._routes.clear()
            if session.will_flag and self._rights.may(
                connection.holder, Action.PUBLISH, session.will_topic
            ):
                await self._publish(
                    session.will_topic,
                    session.will_message,
                    min(session.will_qos, MAX_QOS),
                    retain=session.will_retain,
                )

    async def _publish(self, topic: str, payload: bytes, qos: int, *, retain: bool) -> None:
        """Nothing in here waits: messages reach every subscriber in the order in which they came."""
        if retain and any(matches(each, topic) for each in RETAINED):
            await self.retain_message(None, topic, payload, qos)
        for client_id, granted_qos in self._route(topic).items():
            _, connection = self._sessions[client_id]
            if self._rights.may(connection.holder, Action.SUBSCRIBE, topic):
                connection.deliver(topic, payload, min(qos, granted_qos))

    def _route(self, topic: str) -> dict[str, int]:
        """Who subscribed to `topic`, each once, with its highest QoS."""
        route = self._routes.get(topic)
        if route is None:
            route = {}
            for topic_filter, subscriptions in self._subscriptions.items():
                if matches(topic_filter, topic):
                    for session, qos in subscriptions:
                        route[session.client_id] = max(qos, route.get(session.client_id, 0))
            if len(self._routes) >= MAX_ROUTES:
                self._routes.clear()
            self._routes[topic] = route
        return route

    async def _add_filter(self, connection: Connection, topic_filter: str, qos: int) -> int:
        if len(connection.filters | {topic_filter}) > MAX_FILTERS or not self._is_live(connection):
            return REFUSED
        code: int = await self.add_subscription(
            (topic_filter, min(qos, MAX_QOS)), connection.session
        )
        if code == REFUSED:
            logger.info("%s may not subscribe to %s", connection.name, topic_filter[:200])
        else:
            connection.filters.add(topic_filter)
            self._routes.clear()
        return code

    async def _topic_filtering(self, session: Session, topic: str, action: MqttAction) -> bool:  # noqa: ARG002
        """amqtt asks this for subscriptions. A shared one would be granted and never deliver: MQTT 3.1.1 has none."""
        _, connection = self._sessions[session.client_id]
        return not topic.startswith("$") and self._rights.may(
            connection.holder, Action.SUBSCRIBE, topic
        )

    async def _session_monitor(self) -> None:
        """Puts out who is not active any more, or holds a certificate that was revoked."""
        while True:
            await asyncio.sleep(REVOCATION_S)
            for _, connection in list(self._sessions.values()):
                if self._rights.of(connection.holder) is None:
                    connection.abort("is not enrolled any more, or its certificate was revoked")

    async def _create_server_instance(self, *_: object) -> asyncio.Server:
        """On the socket that was bound before."""
        return await asyncio.start_server(
            lambda reader, writer: self.stream_connected(reader, writer, "default"),
            sock=self._socket,
            ssl=self._tls,
            ssl_handshake_timeout=CONNECT_S,
            ssl_shutdown_timeout=CLOSE_S,
        )

    def _is_live(self, connection: Connection) -> bool:
        return self._sessions.get(connection.session.client_id, (None, None))[1] is connection

    def _is_one_too_many(self, client_id: str, name: str) -> bool:
        num_connections = sum(connection.name == name for _, connection in self._sessions.values())
        return client_id not in self._sessions and num_connections >= MAX_CONNECTIONS_PER_NAME
