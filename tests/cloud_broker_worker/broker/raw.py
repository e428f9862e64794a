"""A client in bytes, for packets that no client library sends."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from fleet.identity.identity import Identity
from tests.brokers import HOST, POLL_S, WAIT_S

ACCEPTED = b"\x20\x02\x00\x00"
REFUSED = b"\x20\x02\x00\x05"
WRONG_VERSION = b"\x20\x02\x00\x01"
PINGREQ = b"\xc0\x00"
PINGRESP = b"\xd0\x00"


@contextmanager
def tls_socket(identity: Identity) -> Iterator[ssl.SSLSocket]:
    """Open a TLS connection to the identity's broker; no packet is sent."""
    with (
        socket.create_connection((HOST, identity.config.port), WAIT_S) as plain,
        identity.ssl_context().wrap_socket(plain, server_hostname=HOST) as secure,
    ):
        yield secure


@contextmanager
def connected(
    identity: Identity, keep_alive_s: int = 0, will: tuple[str, bytes] | None = None
) -> Iterator[ssl.SSLSocket]:
    """Open a `tls_socket` and connect under its own name."""
    with tls_socket(identity) as secure:
        secure.sendall(connect(identity.name, keep_alive_s=keep_alive_s, will=will))
        assert receive(secure, 4) == ACCEPTED
        yield secure


def connect(
    client_id: str, *, level: int = 4, keep_alive_s: int = 0, will: tuple[str, bytes] | None = None
) -> bytes:
    """Return a CONNECT packet (MQTT 3.1.1 section 3.1); the will is retained, with QoS 1."""
    flags = 0x02 | (0x2C if will else 0)
    body = (
        string(b"MQTT")
        + bytes([level, flags])
        + keep_alive_s.to_bytes(2)
        + string(client_id.encode())
    )
    if will:
        body += string(will[0].encode()) + string(will[1])
    return packet(0x10, body)


def publish(topic: str, payload: bytes, qos: int = 0, packet_id: int = 1) -> bytes:
    return packet(
        0x30 | qos << 1, string(topic.encode()) + (packet_id.to_bytes(2) if qos else b"") + payload
    )


def subscribe(topic_filter: str, qos: int = 0, packet_id: int = 1) -> bytes:
    return packet(0x82, packet_id.to_bytes(2) + string(topic_filter.encode()) + bytes([qos]))


def subscribe_all(filters: list[str], packet_id: int = 1) -> bytes:
    """Return one SUBSCRIBE for QoS 0 with all `filters`."""
    entries = b"".join(string(each.encode()) + b"\0" for each in filters)
    return packet(0x82, packet_id.to_bytes(2) + entries)


def unsubscribe_all(filters: list[str], packet_id: int = 1) -> bytes:
    """Return one UNSUBSCRIBE with all `filters`."""
    entries = b"".join(string(each.encode()) for each in filters)
    return packet(0xA2, packet_id.to_bytes(2) + entries)


def packet(first: int, body: bytes) -> bytes:
    return bytes([first]) + length(len(body)) + body


def length(value: int) -> bytes:
    """Encode the remaining length (section 2.2.3)."""
    encoded = bytearray()
    while True:
        encoded.append(value & 0x7F | (0x80 if value > 0x7F else 0))
        value >>= 7
        if not value:
            return bytes(encoded)


def string(data: bytes) -> bytes:
    return len(data).to_bytes(2) + data


def receive(sock: ssl.SSLSocket, count: int) -> bytes:
    """Receive `count` bytes, or fewer if the connection ends."""
    data = b""
    try:
        while len(data) < count and (more := sock.recv(count - len(data))):
            data += more
    except (ConnectionError, ssl.SSLError):
        pass
    return data


def is_closed(sock: ssl.SSLSocket) -> bool:
    """Wait for the broker to end this connection; whether it did."""
    return receive(sock, 1) == b""


def has_ended(sock: ssl.SSLSocket) -> bool:
    """Whether the broker has ended this connection; a condition of `wait_until`."""
    sock.settimeout(POLL_S)
    with suppress(TimeoutError):
        return is_closed(sock)
    return False
