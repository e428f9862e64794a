"""Packets of MQTT 3.1.1: those of other programs, and bytes that are none."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cloud_broker_worker.broker.packets import (
    MAX_ENTRIES,
    BrokerMessage,
    ClientPacket,
    ConnectPacket,
    PublishPacket,
    SubscribePacket,
    UnsubscribePacket,
    read_packet,
    suback,
)
from fleet.errors import DecodeError, ProtocolError
from tests.cloud_broker_worker.broker import raw

TOPIC = st.text(st.characters(exclude_characters="+#\0", codec="utf-8"), min_size=1, max_size=20)


def decoded(data: bytes) -> ClientPacket | None:
    async def read() -> ClientPacket | None:
        stream = asyncio.StreamReader()
        stream.feed_data(data)
        stream.feed_eof()
        return await read_packet(stream)

    return asyncio.run(read())


@given(st.binary(max_size=60))
@example(b"\x10\x04\x00\x02\xff\xff")
@example(b"\x82\x02\x00\x01")
@example(b"\xc0\x01\x00")
def test_any_bytes_are_a_packet_or_an_error_of_the_protocol(data: bytes) -> None:
    with suppress(ProtocolError):
        decoded(data)


@given(TOPIC, st.binary(max_size=300), st.booleans())
def test_a_message_that_was_encoded_is_decoded(topic: str, payload: bytes, retain: bool) -> None:
    message = BrokerMessage(topic, payload, 1, retain)
    assert decoded(message.bytes_at_least_once(7)) == PublishPacket(message, 7)
    once = BrokerMessage(topic, payload, 0, retain)
    assert decoded(message.bytes_at_most_once) == PublishPacket(once, None)


def test_a_connect_packet_is_decoded() -> None:
    packet = decoded(raw.connect("d1", keep_alive_s=15, will=("ce/v1/d/d1/status", b"dead")))
    will = BrokerMessage("ce/v1/d/d1/status", b"dead", 1, retain=True)
    assert packet == ConnectPacket(
        protocol="MQTT", level=4, keep_alive_s=15, client_id="d1", will=will
    )


def test_a_connect_packet_of_mqtt_5_is_known_by_its_level() -> None:
    properties = b"\x05\x11\x00\x00\x00\x0a"
    body = raw.string(b"MQTT") + b"\x05\x02\x00\x3c" + properties + raw.string(b"d1")
    assert decoded(raw.packet(0x10, body)) == ConnectPacket(protocol="MQTT", level=5)


def test_subscriptions_are_decoded() -> None:
    assert decoded(raw.subscribe("a/+", qos=2)) == SubscribePacket(1, [("a/+", 2)])
    assert decoded(raw.unsubscribe_all(["a", "b"])) == UnsubscribePacket(1, ["a", "b"])


@pytest.mark.parametrize("encode", [raw.subscribe_all, raw.unsubscribe_all])
def test_the_filters_of_a_packet_are_counted_before_they_are_kept(
    encode: Callable[[list[str]], bytes],
) -> None:
    decoded(encode(["a"] * MAX_ENTRIES))
    with pytest.raises(DecodeError, match=f"at most {MAX_ENTRIES} filters"):
        decoded(encode(["a"] * (MAX_ENTRIES + 1)))


@pytest.mark.parametrize(
    "name", [b"r\xff1", b"r\x001", b"\xed\xa0\x80", b"\xc0\x80"], ids=lambda name: name.hex()
)
def test_a_topic_that_is_no_utf_8_or_has_a_zero_is_no_packet(name: bytes) -> None:
    for packet in (
        raw.packet(0x30, raw.string(name) + b"payload"),
        raw.packet(0x82, b"\x00\x01" + raw.string(name) + b"\x00"),
        raw.packet(0xA2, b"\x00\x01" + raw.string(name)),
        raw.packet(0x10, raw.string(b"MQTT") + b"\x04\x02\x00\x00" + raw.string(name)),
    ):
        with pytest.raises(DecodeError):
            decoded(packet)


def test_long_packets_have_a_length_of_several_bytes() -> None:
    assert suback(1, [0] * 200) == b"\x90\xca\x01\x00\x01" + bytes(200)
