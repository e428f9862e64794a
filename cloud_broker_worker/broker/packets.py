"""MQTT packets from a stream; the size is checked before memory is allocated."""

from __future__ import annotations

import asyncio
from typing import Final, TypeAlias

from amqtt.adapters import BufferReader
from amqtt.errors import AMQTTError, CodecError, MQTTError, NoDataError
from amqtt.mqtt import packet_class
from amqtt.mqtt.packet import PUBLISH, PUBREL, SUBSCRIBE, UNSUBSCRIBE, MQTTFixedHeader, MQTTPacket

from fleet.errors import DecodeError, OversizedError
from fleet.transport.base import MAX_PACKET_BYTES

MAX_LENGTH_BYTES: Final = 4
# Flags of the fixed header; other packets have none, and PUBLISH has any.
FLAGS: Final = {PUBREL: 0b0010, SUBSCRIBE: 0b0010, UNSUBSCRIBE: 0b0010}

Packet: TypeAlias = MQTTPacket


async def read_packet(
    stream: asyncio.StreamReader, max_bytes: int = MAX_PACKET_BYTES
) -> Packet | None:
    """Read the next packet; None if the stream ends between two packets (MQTT 3.1.1 section 2.2).

    Raises:
        OversizedError: the packet is longer than `max_bytes`; nothing of its body was read.
        DecodeError: the bytes are no packet.
    """
    try:
        first = (await stream.readexactly(1))[0]
    except asyncio.IncompleteReadError:
        return None
    kind = first >> 4
    flags = first & 0x0F
    # Section 2.2.2; a client of another protocol fails here.
    if kind != PUBLISH and flags != FLAGS.get(kind, 0):
        raise DecodeError(f"expected an MQTT 3.1.1 packet, got the first byte {first:#04x}")
    try:
        length = await _read_length(stream)
        if length > max_bytes:
            raise OversizedError(
                f"expected a packet of at most {max_bytes} bytes, got one of {length}"
            )
        body = BufferReader(await stream.readexactly(length))
        header = MQTTFixedHeader(kind, flags, length)
        packet: Packet = await packet_class(header).from_stream(body, fixed_header=header)
    except (
        AMQTTError,
        MQTTError,
        CodecError,
        NoDataError,
        ValueError,
        asyncio.IncompleteReadError,
    ) as error:
        raise DecodeError(f"expected an MQTT 3.1.1 packet, got other bytes: {error}") from None
    return packet


async def _read_length(stream: asyncio.StreamReader) -> int:
    """Read the remaining length, 7 bits a byte, lowest first (section 2.2.3)."""
    length = 0
    for i in range(MAX_LENGTH_BYTES):
        byte = (await stream.readexactly(1))[0]
        length |= (byte & 0x7F) << (7 * i)
        if byte < 0x80:
            return length
    raise DecodeError(f"expected a length of at most {MAX_LENGTH_BYTES} bytes, got more")
