"""One client's connection: reads its packets, and never waits when it writes to it."""

from __future__ import annotations

import asyncio
import logging
from typing import Final, Protocol

from cloud_broker_worker.broker.admission import Admission
from cloud_broker_worker.broker.packets import (
    PINGRESP,
    BrokerMessage,
    ConnectPacket,
    DisconnectPacket,
    PingreqPacket,
    PubackPacket,
    PublishPacket,
    SubscribePacket,
    UnsubscribePacket,
    read_packet,
)
from cloud_broker_worker.broker.token_bucket import PacketBudget
from fleet.errors import DecodeError

MAX_UNSENT_BYTES: Final = 8 << 20
MAX_UNACKNOWLEDGED: Final = 10_000
KEEP_ALIVE_GRACE: Final = 1.5  # MQTT 3.1.1 section 3.1.2.10
TURN: Final = 8
"""Packets of one client that are handled before other clients have their turn."""

logger = logging.getLogger(__name__)


class PacketHandler(Protocol):
    """The operations of the broker that a client's packets trigger; each returns its cost."""

    async def on_publish(self, connection: Connection, packet: PublishPacket) -> float: ...

    async def on_subscribe(self, connection: Connection, packet: SubscribePacket) -> float: ...

    async def on_unsubscribe(self, connection: Connection, packet: UnsubscribePacket) -> float: ...


class Connection:
    """An admitted client: `name` is its certificate's, `client_id` this connection's."""

    def __init__(
        self,
        admission: Admission,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        budget: PacketBudget,
    ) -> None:
        self.holder = admission.holder
        self.name = admission.holder.name
        self.client_id = admission.client_id
        self.will = admission.packet.will
        self.filters: set[str] = set()
        self._silence_s = admission.packet.keep_alive_s * KEEP_ALIVE_GRACE or None
        self._reader = reader
        self._writer = writer
        self._budget = budget
        self._unacknowledged: set[int] = set()
        self._packet_id = 0

    async def serve(self, handler: PacketHandler) -> None:
        """Handle the client's packets in order until its end; after DISCONNECT it has no will.

        The next packet is read when the budget allows it. Meanwhile TCP holds the client back.

        Raises:
            ProtocolError: it sent a packet that a client may not send.
            TimeoutError: it was silent for longer than its keep-alive allows.
        """
        num_packets = 0
        while True:
            async with asyncio.timeout(self._silence_s):
                packet = await read_packet(self._reader)
            if packet is None:
                return
            if isinstance(packet, DisconnectPacket):
                self.will = None
                return
            wait_s = self._budget.spend(await self._handle(packet, handler))
            num_packets += 1
            if wait_s or num_packets % TURN == 0:  # reading does not yield while bytes are there
                await asyncio.sleep(wait_s)

    async def _handle(
        self,
        packet: ConnectPacket
        | PublishPacket
        | PubackPacket
        | SubscribePacket
        | UnsubscribePacket
        | PingreqPacket,
        handler: PacketHandler,
    ) -> float:
        """Handle one packet; return its cost."""
        match packet:
            case PublishPacket():
                return await handler.on_publish(self, packet)
            case PubackPacket():
                self._unacknowledged.discard(packet.packet_id)
                return 0.0  # the sender of the message has paid
            case PingreqPacket():
                self.send(PINGRESP)
                return 1.0
            case SubscribePacket():
                return await handler.on_subscribe(self, packet)
            case UnsubscribePacket():
                return await handler.on_unsubscribe(self, packet)
            case ConnectPacket():
                raise DecodeError("expected one CONNECT in a connection, got a second one")

    def send(self, packet: bytes, *, droppable: bool = False) -> None:
        """Queue one packet.

        A client that reads too slowly loses droppable packets, and is disconnected for others.
        """
        if self._writer.transport.is_closing():
            return
        if self._num_unsent_bytes <= MAX_UNSENT_BYTES:
            self._writer.write(packet)
        elif not droppable:
            self.abort(f"reads too slowly: {MAX_UNSENT_BYTES} bytes wait for it")

    def deliver(self, message: BrokerMessage, granted_qos: int) -> None:
        """Queue one message; QoS 1 occupies a packet id until the client acknowledges it."""
        if min(message.qos, granted_qos) == 0:
            self.send(message.bytes_at_most_once, droppable=True)
            return
        if len(self._unacknowledged) >= MAX_UNACKNOWLEDGED:
            self.abort(f"has not acknowledged {MAX_UNACKNOWLEDGED} messages")
            return
        self._packet_id = self._packet_id % 0xFFFF + 1
        while self._packet_id in self._unacknowledged:
            self._packet_id = self._packet_id % 0xFFFF + 1
        self._unacknowledged.add(self._packet_id)
        self.send(message.bytes_at_least_once(self._packet_id))

    def abort(self, reason: str) -> None:
        """End the connection now, and drop unsent packets."""
        logger.warning("%s is disconnected: it %s", self.client_id, reason)
        self.stop()

    def stop(self) -> None:
        """End the connection now, without a line in the log."""
        self._writer.transport.abort()

    @property
    def _num_unsent_bytes(self) -> int:
        size: int = self._writer.transport.get_write_buffer_size()
        return size
