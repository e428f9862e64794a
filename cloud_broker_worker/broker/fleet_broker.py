"""The fleet's broker: admission, rights, limits, subscriptions and retained messages."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections import defaultdict
from collections.abc import Coroutine, Iterable
from dataclasses import replace
from typing import Final

from cloud_broker_worker.broker.acceptor import Acceptor
from cloud_broker_worker.broker.admission import (
    Admission,
    ConnectRefusal,
    admit,
    certificate_holder,
)
from cloud_broker_worker.broker.connection import Connection
from cloud_broker_worker.broker.packets import (
    SUBSCRIPTION_REFUSED,
    BrokerMessage,
    ConnectCode,
    PublishPacket,
    SubscribePacket,
    UnsubscribePacket,
    connack,
    puback,
    read_packet,
    suback,
    unsuback,
)
from cloud_broker_worker.broker.rights_cache import RightsCache
from cloud_broker_worker.broker.token_bucket import PacketBudget, TokenRate
from cloud_broker_worker.broker.topic_trie import TopicTrie
from fleet.errors import DecodeError, ProtocolError
from fleet.protocol import topics
from fleet.protocol.access import Action, Role
from fleet.protocol.topics import matches
from fleet.utils.rate_limited_log import RateLimitedLog

REVOCATION_S: Final = 1.0  # time between two reads of the registry
MAX_CONNECT_BYTES: Final = 64 * 1024
MAX_QOS: Final = 1
MAX_FILTERS: Final = 100  # subscriptions of one connection
MAX_CONNECTIONS_PER_NAME: Final = 16
MAX_TOPIC_BYTES: Final = 256
MAX_BUDGETS: Final = 10_000
RETAINED: Final = (
    topics.DEVICE_STATUS_FILTER,
    topics.DEVICE_CONFIG_FILTER,
    topics.WORKER_STATUS_FILTER,
    topics.REVOKED,
)
"""Filters of the topics with retained messages. The number of other topics is not limited, so the
broker retains no message on them."""

CLIENT_RATE: Final = TokenRate(per_s=500, burst=2_000)
OWN_RATE: Final = TokenRate(per_s=10_000, burst=50_000)
RATES: Final = {
    Role.DEVICE: CLIENT_RATE,
    Role.APP: CLIENT_RATE,
    Role.WORKER: OWN_RATE,
    Role.SERVER: OWN_RATE,
    Role.GATEWAY: OWN_RATE,
}
"""Tokens of one name per second. A packet costs one token, and more if it is delivered often."""

DELIVERIES_PER_TOKEN: Final = 20
TURN: Final = 50
"""Deliveries of one packet before the event loop serves other clients: about a millisecond."""

logger = logging.getLogger(__name__)


class FleetBroker:
    """A broker whose clients use one name in certificate, client id and user name.

    `rights` are the rights of each name.
    """

    def __init__(self, listener: socket.socket, tls: ssl.SSLContext, rights: RightsCache) -> None:
        self._acceptor = Acceptor(listener, tls, self._serve)
        self._rights = rights
        self._connections: dict[str, Connection] = {}  # by client id
        self._by_name: defaultdict[str, set[Connection]] = defaultdict(set)
        self._subscriptions: TopicTrie[dict[Connection, int]] = TopicTrie()  # with the granted QoS
        self._retained: TopicTrie[BrokerMessage] = TopicTrie()
        self._budgets: dict[str, PacketBudget] = {}  # by name
        self._refusals = RateLimitedLog(logger)
        self._violations = RateLimitedLog(logger)

    async def serve_until(self, stopped: Coroutine[None, None, None]) -> None:
        """Serve connections until `stopped` returns; then close them without their wills."""
        work = (stopped, self._acceptor.run(), self._follow_registry())
        tasks = [asyncio.create_task(each) for each in work]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()  # raises if the listener or `_follow_registry` has failed
        finally:
            for task in tasks:
                task.cancel()
            for connection in list(self._connections.values()):
                connection.will = None
                connection.stop()
            await self._acceptor.close()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection, from its CONNECT packet to its last will."""
        connection = None
        try:
            connection = await self._admit(reader, writer)
            if connection:
                await connection.serve(self)
        except ProtocolError as error:
            text = "connection of %s ended: %s"
            self._violations.warning(text, _label(connection, writer), error)
        except OSError as error:  # also TimeoutError and SSLError
            text = "connection of %s ended: %s"
            logger.info(text, _label(connection, writer), str(error) or type(error).__name__)
        except Exception:
            logger.exception("connection of %s ended", _label(connection, writer))
        finally:
            if connection:
                await self._end_session(connection)

    async def _admit(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> Connection | None:
        """Read CONNECT and respond with CONNACK; return the connection of an admitted client."""
        packet = await read_packet(reader, MAX_CONNECT_BYTES)
        self._acceptor.end_silence()
        holder = certificate_holder(writer.get_extra_info("ssl_object"))
        admission = await admit(packet, holder, self._rights)
        if isinstance(admission, Admission) and self._has_too_many(admission):
            reason = f"{admission.holder.name!r} has {MAX_CONNECTIONS_PER_NAME} connections already"
            admission = ConnectRefusal(ConnectCode.NOT_AUTHORIZED, reason)
        if isinstance(admission, ConnectRefusal):
            peer = writer.get_extra_info("peername")
            self._refusals.warning("a connection from %s is refused: %s", peer, admission.reason)
            writer.write(connack(admission.code))
            return None
        await self._end_predecessor(admission.client_id)
        connection = Connection(admission, reader, writer, self._budget(admission))
        self._connections[connection.client_id] = connection
        self._by_name[connection.name].add(connection)
        connection.send(connack(ConnectCode.ACCEPTED))
        return connection

    def _budget(self, admission: Admission) -> PacketBudget:
        if len(self._budgets) >= MAX_BUDGETS:
            self._budgets.clear()
        rate = RATES[admission.grants.role]
        return self._budgets.setdefault(admission.holder.name, PacketBudget(rate))

    def _has_too_many(self, admission: Admission) -> bool:
        is_new = admission.client_id not in self._connections
        connections = self._by_name.get(admission.holder.name, ())
        return is_new and len(connections) >= MAX_CONNECTIONS_PER_NAME

    async def _end_predecessor(self, client_id: str) -> None:
        """End an older session of the client id without publishing its will."""
        if client_id in self._connections:
            connection = self._connections[client_id]
            connection.will = None
            await self._end_session(connection)
            connection.stop()

    async def _end_session(self, connection: Connection) -> None:
        """End a session and publish its will, unless a newer session has replaced it."""
        if not self._is_live(connection):
            return
        del self._connections[connection.client_id]
        self._by_name[connection.name].discard(connection)
        if not self._by_name[connection.name]:
            del self._by_name[connection.name]
        self._remove_filters(connection, list(connection.filters))
        if connection.will is None:
            return
        if self._rights.permits(connection.holder, Action.PUBLISH, connection.will.topic):
            await self._publish(connection.will)
        else:
            text = "%s may not publish its will to %s"
            self._violations.warning(text, connection.name, connection.will.topic[:200])

    def _is_live(self, connection: Connection) -> bool:
        return self._connections.get(connection.client_id) is connection

    async def on_publish(self, connection: Connection, packet: PublishPacket) -> float:
        """Acknowledge a client's message, then publish it if the client has the right."""
        message = packet.message
        if message.qos > MAX_QOS:
            raise DecodeError("expected QoS 0 or 1, got QoS 2; publish with QoS 1")
        if len(message.topic.encode()) > MAX_TOPIC_BYTES:
            raise DecodeError(f"expected a topic of at most {MAX_TOPIC_BYTES} bytes, got more")
        if packet.packet_id is not None:
            connection.send(puback(packet.packet_id))
        if not self._is_live(connection):
            return 1.0
        if not self._rights.permits(connection.holder, Action.PUBLISH, message.topic):
            text = "%s may not publish to %s"
            self._violations.warning(text, connection.name, message.topic[:200])
            return 1.0
        return _cost(1, await self._publish(message))

    async def _publish(self, message: BrokerMessage) -> int:
        """Deliver a message; return the number of its receivers.

        It never waits for a receiver, so each receives a sender's messages in order. A retained
        message is delivered to all receivers in one step. So all of them agree which message of a
        topic is the newest, for example a status or the will of an earlier connection.
        """
        if message.retain:
            self._retain(message)
        live = replace(message, retain=False)
        route = self._route(message.topic)
        for i, (connection, granted_qos) in enumerate(route.items()):
            if i and i % TURN == 0 and not message.retain:
                await asyncio.sleep(0)
            if self._is_live(connection) and self._rights.permits(
                connection.holder, Action.SUBSCRIBE, message.topic
            ):
                connection.deliver(live, granted_qos)
        return len(route)

    def _retain(self, message: BrokerMessage) -> None:
        if not any(matches(each, message.topic) for each in RETAINED):
            return
        if message.payload:
            self._retained.put(message.topic, replace(message, qos=min(message.qos, MAX_QOS)))
        else:
            self._retained.remove(message.topic)

    def _route(self, topic: str) -> dict[Connection, int]:
        """Return the subscribers of `topic`, each with the highest QoS of its filters."""
        route: dict[Connection, int] = {}
        for subscribers in self._subscriptions.values_for_topic(topic):
            for connection, qos in subscribers.items():
                route[connection] = max(qos, route.get(connection, 0))
        return route

    async def on_subscribe(self, connection: Connection, packet: SubscribePacket) -> float:
        """Add the filters that the client may subscribe to, and send their retained messages."""
        distinct = dict(packet.entries)
        codes = {each: self._add_filter(connection, each, qos) for each, qos in distinct.items()}
        connection.send(suback(packet.packet_id, [codes[each] for each, _ in packet.entries]))
        refused = [each for each, code in codes.items() if code == SUBSCRIPTION_REFUSED]
        if refused:
            text = "%s may not subscribe to %s; refused filters: %d"
            self._violations.warning(text, connection.name, refused[0][:200], len(refused))
        granted = {each: codes[each] for each in codes.keys() - set(refused)}
        return _cost(len(distinct), await self._send_retained(connection, granted))

    def _add_filter(self, connection: Connection, topic_filter: str, qos: int) -> int:
        """Add a subscription; return its granted QoS, or `SUBSCRIPTION_REFUSED`.

        A shared subscription is refused, because MQTT 3.1.1 has none: it would never deliver.
        """
        is_new = topic_filter not in connection.filters
        if (is_new and len(connection.filters) >= MAX_FILTERS) or not self._is_live(connection):
            return SUBSCRIPTION_REFUSED
        if topic_filter.startswith("$") or not self._rights.permits(
            connection.holder, Action.SUBSCRIBE, topic_filter
        ):
            return SUBSCRIPTION_REFUSED
        subscribers = self._subscriptions.get(topic_filter)
        if subscribers is None:
            subscribers = {}
            self._subscriptions.put(topic_filter, subscribers)
        subscribers[connection] = min(qos, MAX_QOS)
        connection.filters.add(topic_filter)
        return subscribers[connection]

    async def _send_retained(self, connection: Connection, granted: dict[str, int]) -> int:
        """Send the retained messages of new subscriptions; return their number."""
        num_sent = 0
        for topic_filter, qos in granted.items():
            for topic in list(self._retained.paths_in_filter(topic_filter)):
                message = self._retained.get(topic)  # other tasks may have replaced it
                if message:
                    connection.deliver(message, qos)
                num_sent += 1
                if num_sent % TURN == 0:
                    await asyncio.sleep(0)
        return num_sent

    async def on_unsubscribe(self, connection: Connection, packet: UnsubscribePacket) -> float:
        """Remove filters."""
        distinct = set(packet.filters)
        self._remove_filters(connection, distinct & connection.filters)
        connection.send(unsuback(packet.packet_id))
        return _cost(len(distinct), 0)

    def _remove_filters(self, connection: Connection, filters: Iterable[str]) -> None:
        for topic_filter in filters:
            connection.filters.discard(topic_filter)
            subscribers = self._subscriptions.get(topic_filter)
            if subscribers is None:
                continue
            subscribers.pop(connection, None)
            if not subscribers:
                self._subscriptions.remove(topic_filter)

    async def _follow_registry(self) -> None:
        """Disconnect identities that are no longer active, or whose certificate was revoked."""
        while True:
            await self._rights.refresh({each.holder for each in self._connections.values()})
            for connection in list(self._connections.values()):
                if self._rights.get(connection.holder) is None:
                    connection.abort(self._rights.reason_without_rights())
            await asyncio.sleep(REVOCATION_S)


def _cost(num_entries: int, num_deliveries: int) -> float:
    """Return the cost of a packet in tokens. Its entries are its filters or its message."""
    return num_entries + num_deliveries / DELIVERIES_PER_TOKEN


def _label(connection: Connection | None, writer: asyncio.StreamWriter) -> str:
    """Return a connection's client id, or the peer's address before its admission."""
    return str(connection.client_id if connection else writer.get_extra_info("peername"))
