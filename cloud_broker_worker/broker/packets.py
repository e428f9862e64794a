"""MQTT 3.1.1 packets from a stream and to bytes.

A packet's size is checked before memory is allocated, and the number of its filters before any of
them is looked at.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Final, TypeAlias

from fleet.errors import DecodeError, OversizedError
from fleet.transport.base import MAX_PACKET_BYTES

MAX_LENGTH_BYTES: Final = 4
MAX_ENTRIES: Final = 1_000  # filters in one SUBSCRIBE or UNSUBSCRIBE
MAX_QOS_LEVEL: Final = 2
MQTT_3_1_1: Final = 4
WILDCARDS: Final = frozenset("+#")
PINGRESP: Final = b"\xd0\x00"


class PacketKind(IntEnum):
    """The upper four bits of a packet's first byte (section 2.2.1); a client sends these."""

    CONNECT = 1
    PUBLISH = 3
    PUBACK = 4
    SUBSCRIBE = 8
    UNSUBSCRIBE = 10
    PINGREQ = 12
    DISCONNECT = 14


KINDS: Final = frozenset(PacketKind)


class ConnectCode(IntEnum):
    """The return codes of CONNACK (section 3.2.2.3)."""

    ACCEPTED = 0
    UNACCEPTABLE_VERSION = 1
    UNAVAILABLE = 3
    NOT_AUTHORIZED = 5


# Flags of the fixed header; other packets have none, and PUBLISH has any (section 2.2.2).
FLAGS: Final = {PacketKind.SUBSCRIBE: 0b0010, PacketKind.UNSUBSCRIBE: 0b0010}
SUBSCRIPTION_REFUSED: Final = 0x80


@dataclass(frozen=True)
class BrokerMessage:
    """An application message; `bytes_at_most_once` is made once for all its receivers."""

    topic: str
    payload: bytes
    qos: int
    retain: bool

    @cached_property
    def bytes_at_most_once(self) -> bytes:
        """The message as a PUBLISH packet of QoS 0."""
        head = _string(self.topic)
        return _packet(PacketKind.PUBLISH << 4 | self.retain, head + self.payload)

    def bytes_at_least_once(self, packet_id: int) -> bytes:
        """Return the message as a PUBLISH packet of QoS 1."""
        head = _string(self.topic) + packet_id.to_bytes(2)
        return _packet(PacketKind.PUBLISH << 4 | 0b0010 | self.retain, head + self.payload)


@dataclass(frozen=True, kw_only=True)
class ConnectPacket:
    """CONNECT; of another version than 3.1.1 only `protocol` and `level` are read."""

    protocol: str
    level: int
    keep_alive_s: int = 0
    client_id: str = ""
    username: str | None = None
    will: BrokerMessage | None = None


@dataclass(frozen=True)
class PublishPacket:
    """PUBLISH; `packet_id` is None for QoS 0."""

    message: BrokerMessage
    packet_id: int | None


@dataclass(frozen=True)
class PubackPacket:
    """PUBACK: the client has the message of QoS 1 with this packet id."""

    packet_id: int


@dataclass(frozen=True)
class SubscribePacket:
    """SUBSCRIBE: filters with the requested QoS."""

    packet_id: int
    entries: list[tuple[str, int]]


@dataclass(frozen=True)
class UnsubscribePacket:
    """UNSUBSCRIBE."""

    packet_id: int
    filters: list[str]


class PingreqPacket:
    """PINGREQ."""


class DisconnectPacket:
    """DISCONNECT."""


ClientPacket: TypeAlias = (
    ConnectPacket
    | PublishPacket
    | PubackPacket
    | SubscribePacket
    | UnsubscribePacket
    | PingreqPacket
    | DisconnectPacket
)


async def read_packet(
    stream: asyncio.StreamReader, max_bytes: int = MAX_PACKET_BYTES
) -> ClientPacket | None:
    """Read the next packet; None if the stream ends between two packets (MQTT 3.1.1 section 2.2).

    Raises:
        OversizedError: the packet is longer than `max_bytes`; nothing of its body was read.
        DecodeError: the bytes are no packet that a client may send.
    """
    try:
        first = (await stream.readexactly(1))[0]
    except asyncio.IncompleteReadError:
        return None
    # A client of another protocol fails here.
    if first >> 4 not in KINDS or not _has_legal_flags(first):
        raise DecodeError(f"expected a client's MQTT 3.1.1 packet, got the first byte {first:#04x}")
    try:
        length = await _read_length(stream)
        if length > max_bytes:
            raise OversizedError(
                f"expected a packet of at most {max_bytes} bytes, got one of {length}"
            )
        body = await stream.readexactly(length)
    except asyncio.IncompleteReadError as error:
        raise DecodeError(f"expected a whole MQTT 3.1.1 packet: {error}") from None
    return decode_packet(first, body)


def _has_legal_flags(first: int) -> bool:
    kind = first >> 4
    return kind == PacketKind.PUBLISH or first & 0x0F == FLAGS.get(PacketKind(kind), 0)


async def _read_length(stream: asyncio.StreamReader) -> int:
    """Read the remaining length, 7 bits a byte, lowest first (section 2.2.3)."""
    length = 0
    for i in range(MAX_LENGTH_BYTES):
        byte = (await stream.readexactly(1))[0]
        length |= (byte & 0x7F) << (7 * i)
        if byte < 0x80:
            return length
    raise DecodeError(f"expected a length of at most {MAX_LENGTH_BYTES} bytes, got more")


def decode_packet(first: int, body: bytes) -> ClientPacket:
    """Return the packet with the first byte `first`, whose flags are legal, and this body.

    Raises:
        DecodeError: the body has another shape.
    """
    fields = _Fields(body)
    match first >> 4:
        case PacketKind.CONNECT:
            return _connect_packet(fields)
        case PacketKind.PUBLISH:
            return _publish_packet(first & 0x0F, fields)
        case PacketKind.SUBSCRIBE:
            return _subscribe_packet(fields)
        case PacketKind.UNSUBSCRIBE:
            return _unsubscribe_packet(fields)
        case PacketKind.PUBACK:
            packet_id = fields.packet_id()
            fields.end()
            return PubackPacket(packet_id)
        case kind:
            fields.end()
            return PingreqPacket() if kind == PacketKind.PINGREQ else DisconnectPacket()


class _Fields:
    """The fields of a packet's body, in order."""

    def __init__(self, body: bytes) -> None:
        self._body = body
        self._at = 0

    @property
    def are_left(self) -> bool:
        return self._at < len(self._body)

    def take(self, length: int) -> bytes:
        """The next `length` bytes."""
        field = self._body[self._at : self._at + length]
        if len(field) < length:
            raise DecodeError(f"expected {length} more bytes in a packet, got {len(field)}")
        self._at += length
        return field

    def byte(self) -> int:
        return self.take(1)[0]

    def number(self) -> int:
        """Two bytes, big endian."""
        return int.from_bytes(self.take(2))

    def packet_id(self) -> int:
        """A packet id, which is never 0 (section 2.3.1)."""
        packet_id = self.number()
        if not packet_id:
            raise DecodeError("expected a packet id from 1 to 65535, got 0")
        return packet_id

    def binary(self) -> bytes:
        """Read a length, then as many bytes."""
        return self.take(self.number())

    def string(self) -> str:
        """UTF-8 without U+0000 (section 1.5.3)."""
        encoded = self.binary()
        try:
            text = encoded.decode()
        except UnicodeDecodeError:
            raise DecodeError(f"expected UTF-8, got {encoded[:80]!r}") from None
        if "\0" in text:
            raise DecodeError(f"expected a string without U+0000, got {encoded[:80]!r}")
        return text

    def topic_filter(self) -> str:
        topic_filter = self.string()
        if not topic_filter:
            raise DecodeError("expected a topic filter, got an empty one")
        return topic_filter

    def rest(self) -> bytes:
        return self.take(len(self._body) - self._at)

    def end(self) -> None:
        if self.are_left:
            raise DecodeError(f"expected the end of a packet, got {len(self.rest())} more bytes")


def _connect_packet(fields: _Fields) -> ConnectPacket:
    """Decode CONNECT (section 3.1)."""
    protocol = fields.string()
    level = fields.byte()
    if protocol != "MQTT" or level != MQTT_3_1_1:
        return ConnectPacket(protocol=protocol, level=level)
    flags = fields.byte()
    keep_alive_s = fields.number()
    client_id = fields.string()
    will = None
    if flags & 0x04:
        will_topic = fields.string()
        qos = _legal_qos(flags >> 3 & 0b11)
        will = BrokerMessage(will_topic, fields.binary(), qos, bool(flags & 0x20))
    username = fields.string() if flags & 0x80 else None
    if flags & 0x40:
        fields.binary()  # the password: a certificate proves the name
    fields.end()
    return ConnectPacket(
        protocol=protocol,
        level=level,
        keep_alive_s=keep_alive_s,
        client_id=client_id,
        username=username,
        will=will,
    )


def _publish_packet(flags: int, fields: _Fields) -> PublishPacket:
    """Decode PUBLISH (section 3.3)."""
    qos = _legal_qos(flags >> 1 & 0b11)
    topic = fields.string()
    if not topic or WILDCARDS & set(topic):
        raise DecodeError(f"expected a topic without wildcards, got {topic[:80]!r}")
    packet_id = fields.packet_id() if qos else None
    return PublishPacket(BrokerMessage(topic, fields.rest(), qos, bool(flags & 1)), packet_id)


def _subscribe_packet(fields: _Fields) -> SubscribePacket:
    """Decode SUBSCRIBE (section 3.8)."""
    packet_id = fields.packet_id()
    entries = [(fields.topic_filter(), _legal_qos(fields.byte()))]
    while fields.are_left:
        _check_room(entries)
        entries.append((fields.topic_filter(), _legal_qos(fields.byte())))
    return SubscribePacket(packet_id, entries)


def _unsubscribe_packet(fields: _Fields) -> UnsubscribePacket:
    """Decode UNSUBSCRIBE (section 3.10)."""
    packet_id = fields.packet_id()
    filters = [fields.topic_filter()]
    while fields.are_left:
        _check_room(filters)
        filters.append(fields.topic_filter())
    return UnsubscribePacket(packet_id, filters)


def _check_room(entries: list[str] | list[tuple[str, int]]) -> None:
    if len(entries) == MAX_ENTRIES:
        raise DecodeError(
            f"expected at most {MAX_ENTRIES} filters in one packet, got more; send several packets"
        )


def _legal_qos(qos: int) -> int:
    if qos > MAX_QOS_LEVEL:
        raise DecodeError(f"expected QoS 0, 1 or 2, got {qos}")
    return qos


def connack(code: ConnectCode) -> bytes:
    """Return CONNACK without a session that was present before."""
    return bytes([0x20, 2, 0, code])


def puback(packet_id: int) -> bytes:
    """Return PUBACK."""
    return b"\x40\x02" + packet_id.to_bytes(2)


def suback(packet_id: int, codes: Iterable[int]) -> bytes:
    """Return SUBACK: for each filter the granted QoS, or `SUBSCRIPTION_REFUSED`."""
    return _packet(0x90, packet_id.to_bytes(2) + bytes(codes))


def unsuback(packet_id: int) -> bytes:
    """Return UNSUBACK."""
    return b"\xb0\x02" + packet_id.to_bytes(2)


def _packet(first: int, body: bytes) -> bytes:
    """Return a packet: the first byte, the remaining length (section 2.2.3), the body."""
    length = len(body)
    head = bytearray([first])
    while length > 0x7F:
        head.append(length & 0x7F | 0x80)
        length >>= 7
    head.append(length)
    return bytes(head) + body


def _string(text: str) -> bytes:
    encoded = text.encode()
    return len(encoded).to_bytes(2) + encoded
