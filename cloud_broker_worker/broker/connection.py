"""One client's connection: reads its packets, and never waits when it writes to it."""

from __future__ import annotations

import asyncio
import logging
from typing import Final, Protocol

from amqtt.mqtt.disconnect import DisconnectPacket
from amqtt.mqtt.pingreq import PingReqPacket
from amqtt.mqtt.pingresp import PingRespPacket
from amqtt.mqtt.puback import PubackPacket
from amqtt.mqtt.publish import PublishPacket
from amqtt.mqtt.subscribe import SubscribePacket
from amqtt.mqtt.unsubscribe import UnsubscribePacket
from amqtt.session import Session

from cloud_broker_worker.broker.packets import Packet, read_packet
from cloud_broker_worker.broker.rights_cache import CertificateHolder
from fleet.errors import DecodeError

MAX_UNSENT_BYTES: Final = 8 << 20
MAX_UNACKNOWLEDGED: Final = 10_000
KEEP_ALIVE_GRACE: Final = 1.5  # MQTT 3.1.1 section 3.1.2.10

logger = logging.getLogger(__name__)


class PacketHandler(Protocol):
    """The operations of the broker that a client's packets trigger."""

    async def on_publish(self, connection: Connection, packet: PublishPacket) -> None: ...

    async def on_subscribe(self, connection: Connection, packet: SubscribePacket) -> None: ...

    async def on_unsubscribe(self, connection: Connection, packet: UnsubscribePacket) -> None: ...


class Connection:
    """An admitted client: `name` is its certificate's, `session.client_id` this connection's."""

    def __init__(
        self,
        holder: CertificateHolder,
        session: Session,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self.holder = holder
        self.name = holder.name
        self.session = session
        self.filters: set[str] = set()
        self._reader = reader
        self._writer = writer
        self._unacknowledged: set[int] = set()
        self._packet_id = 0

    async def serve(self, handler: PacketHandler) -> bool:
        """Handle the client's packets in order until its end.

        Return whether the client sent DISCONNECT; if not, its will is due.

        Raises:
            ProtocolError: it sent a packet that a client may not send.
            TimeoutError: it was silent for longer than its keep-alive allows.
        """
        silence_s = self.session.keep_alive * KEEP_ALIVE_GRACE or None
        while True:
            async with asyncio.timeout(silence_s):
                packet = await read_packet(self._reader)
            match packet:
                case PublishPacket():
                    await handler.on_publish(self, packet)
                case PubackPacket():
                    self._unacknowledged.discard(packet.variable_header.packet_id)
                case PingReqPacket():
                    self.send(PingRespPacket())
                case SubscribePacket():
                    await handler.on_subscribe(self, packet)
                case UnsubscribePacket():
                    await handler.on_unsubscribe(self, packet)
                case DisconnectPacket():
                    return True
                case None:
                    return False
                case _:
                    raise DecodeError(
                        f"expected a client's packet with QoS 0 or 1, got {type(packet).__name__}"
                    )

    def send(self, packet: Packet, *, droppable: bool = False) -> None:
        """Queue one packet.

        A client that reads too slowly loses droppable packets, and is disconnected for others.
        """
        if self._writer.transport.is_closing():
            return
        if self._num_unsent_bytes <= MAX_UNSENT_BYTES:
            self._writer.write(packet.to_bytes())
        elif not droppable:
            self.abort(f"reads too slowly: {MAX_UNSENT_BYTES} bytes wait for it")

    def deliver(self, topic: str, payload: bytes, qos: int, *, retain: bool = False) -> None:
        """Queue one message; QoS 1 occupies a packet id until the client acknowledges it."""
        if qos == 0:
            self.send(_publish_packet(topic, payload, None, retain), droppable=True)
            return
        if len(self._unacknowledged) >= MAX_UNACKNOWLEDGED:
            self.abort(f"has not acknowledged {MAX_UNACKNOWLEDGED} messages")
            return
        self._packet_id = self._packet_id % 0xFFFF + 1
        while self._packet_id in self._unacknowledged:
            self._packet_id = self._packet_id % 0xFFFF + 1
        self._unacknowledged.add(self._packet_id)
        self.send(_publish_packet(topic, payload, self._packet_id, retain))

    def abort(self, reason: str) -> None:
        """End the connection now, and drop unsent packets."""
        logger.warning("%s is disconnected: it %s", self.session.client_id, reason)
        self._writer.transport.abort()

    async def stop(self) -> None:
        """End the connection; amqtt calls this at its own shutdown."""
        self._writer.transport.abort()

    @property
    def _num_unsent_bytes(self) -> int:
        size: int = self._writer.transport.get_write_buffer_size()
        return size


def _publish_packet(
    topic: str, payload: bytes, packet_id: int | None, retain: bool
) -> PublishPacket:
    """Build a message, with QoS 1 if it has a packet id."""
    return PublishPacket.build(
        topic_name=topic,
        message=payload,
        packet_id=packet_id,
        dup_flag=False,
        qos=0 if packet_id is None else 1,
        retain=retain,
    )
