"""Messages as exact bytes, both ways."""

import zlib
from typing import Any

import msgpack
import numpy as np
import pytest
from msgspec.structs import replace

from fleet.errors import DecodeError, OversizedError
from fleet.protocol.codec import (
    MAX_ENVELOPE_BYTES,
    TOKEN_BYTES,
    TOKEN_DTYPE,
    decode,
    decode_to_device,
    decode_to_worker,
    encode,
    pack_chunk,
    pack_token_ids,
    unpack_chunk,
    unpack_tokens,
)
from fleet.protocol.messages import (
    MAX_CHUNK_BYTES,
    ChoiceRules,
    Close,
    Context,
    ContextChunk,
    Continuation,
    Gap,
    Message,
    Open,
    Opened,
    Received,
    Refused,
    Sampling,
    Verified,
    Verify,
)

WIRE: list[tuple[Message, bytes]] = [
    (
        Open(
            session="s1",
            epoch=7,
            bundle_id="b1",
            protocol=1,
            sampling=Sampling(0.5, 1.0, 40, 9),
            max_positions=2048,
            deadline_ms=1500,
        ),
        b"\x89\xa4type\xa4open\xa7session\xa2s1\xa5epoch\x07\xa9bundle_id\xa2b1\xa8protocol\x01"
        b"\xa8sampling\x84\xabtemperature\xcb\x3f\xe0\0\0\0\0\0\0\xa5top_p\xcb\x3f\xf0\0\0\0\0\0\0\xa5top_k\x28\xa4seed\x09"
        b"\xadmax_positions\xcd\x08\x00\xabdeadline_ms\xcd\x05\xdc\xa6branch\x00",
    ),
    (
        Open(
            session="s1",
            epoch=7,
            bundle_id="b1",
            protocol=4,
            sampling=Sampling(),
            max_positions=1,
            deadline_ms=1,
            upload_layer=15,
        ),
        b"\x8a\xa4type\xa4open\xa7session\xa2s1\xa5epoch\x07\xa9bundle_id\xa2b1\xa8protocol\x04"
        b"\xa8sampling\x84\xabtemperature\xcb\0\0\0\0\0\0\0\0\xa5top_p\xcb\x3f\xf0\0\0\0\0\0\0\xa5top_k\0\xa4seed\0"
        b"\xadmax_positions\x01\xabdeadline_ms\x01\xa6branch\x00\xacupload_layer\x0f",
    ),
    (
        Open(
            session="s1",
            epoch=7,
            bundle_id="b1",
            protocol=5,
            sampling=Sampling(),
            max_positions=1,
            deadline_ms=1,
            rules=ChoiceRules(
                min_p=0.5,
                repetition_penalty=1.5,
                presence_penalty=-2.0,
                frequency_penalty=2.0,
                logit_bias=((7, -100.0),),
                prompt_length=3,
                top_logprobs=20,
            ),
        ),
        b"\x8a\xa4type\xa4open\xa7session\xa2s1\xa5epoch\x07\xa9bundle_id\xa2b1\xa8protocol\x05"
        b"\xa8sampling\x84\xabtemperature\xcb\0\0\0\0\0\0\0\0\xa5top_p\xcb\x3f\xf0\0\0\0\0\0\0\xa5top_k\0\xa4seed\0"
        b"\xadmax_positions\x01\xabdeadline_ms\x01\xa6branch\x00"
        b"\xa5rules\x87\xa5min_p\xcb\x3f\xe0\0\0\0\0\0\0\xb2repetition_penalty\xcb\x3f\xf8\0\0\0\0\0\0"
        b"\xb0presence_penalty\xcb\xc0\0\0\0\0\0\0\0\xb1frequency_penalty\xcb\x40\0\0\0\0\0\0\0"
        b"\xaalogit_bias\x91\x92\x07\xcb\xc0\x59\0\0\0\0\0\0\xadprompt_length\x03\xactop_logprobs\x14",
    ),
    (
        Open(
            session="s2",
            epoch=7,
            bundle_id="b1",
            protocol=4,
            sampling=Sampling(),
            max_positions=1,
            deadline_ms=1,
            continues=Continuation(session="s1", branch=3, num_positions=300),
        ),
        b"\x8a\xa4type\xa4open\xa7session\xa2s2\xa5epoch\x07\xa9bundle_id\xa2b1\xa8protocol\x04"
        b"\xa8sampling\x84\xabtemperature\xcb\0\0\0\0\0\0\0\0\xa5top_p\xcb\x3f\xf0\0\0\0\0\0\0\xa5top_k\0\xa4seed\0"
        b"\xadmax_positions\x01\xabdeadline_ms\x01\xa6branch\x00"
        b"\xa9continues\x83\xa7session\xa2s1\xa6branch\x03\xadnum_positions\xcd\x01\x2c",
    ),
    (
        Opened(
            session="s1",
            worker="w1",
            received=300,
            max_chunk_bytes=65536,
            window_bytes=1 << 20,
            dtypes=("float16", "int8"),
        ),
        b"\x87\xa4type\xa6opened\xa7session\xa2s1\xa6worker\xa2w1\xa8received\xcd\x01\x2c"
        b"\xafmax_chunk_bytes\xce\x00\x01\x00\x00\xacwindow_bytes\xce\x00\x10\x00\x00"
        b"\xa6dtypes\x92\xa7float16\xa4int8",
    ),
    (
        Context(
            "s1",
            ContextChunk(branch=2, start=5, count=1, data=b"\x00\x3c\x00\xc0", crc32=0x97510158),
        ),
        b"\x83\xa4type\xa7context\xa7session\xa2s1\xa5chunk\x85\xa6branch\x02\xa5start\x05\xa5count\x01"
        b"\xa4data\xc4\x04\x00\x3c\x00\xc0\xa5crc32\xce\x97\x51\x01\x58",
    ),
    (
        Context(
            "s1",
            ContextChunk(
                branch=2,
                start=5,
                count=1,
                data=b"\x00\x3c\x00\xc0",
                crc32=0xF3F34748,
                tokens=b"\xff\xbf\0\0",
            ),
        ),
        b"\x83\xa4type\xa7context\xa7session\xa2s1\xa5chunk\x86\xa6branch\x02\xa5start\x05\xa5count\x01"
        b"\xa4data\xc4\x04\x00\x3c\x00\xc0\xa5crc32\xce\xf3\xf3\x47\x48"
        b"\xa6tokens\xc4\x04\xff\xbf\0\0",
    ),
    (
        Context("s1", pack_token_ids(2, 5, np.array([49151], TOKEN_DTYPE))),
        b"\x83\xa4type\xa7context\xa7session\xa2s1\xa5chunk\x86\xa6branch\x02\xa5start\x05\xa5count\x01"
        b"\xa4data\xc4\x04\xff\xbf\0\0\xa5crc32\xce\x31\x43\x60\xc0\xa5dtype\xa6tokens",
    ),
    (
        Verify(session="s1", request=3, branch=2, start=41, draft=(7, 49151), deadline_ms=1500),
        b"\x87\xa4type\xa6verify\xa7session\xa2s1\xa7request\x03\xa6branch\x02\xa5start\x29"
        b"\xa5draft\x92\x07\xcd\xbf\xff\xabdeadline_ms\xcd\x05\xdc",
    ),
    (
        Verify(
            session="s1",
            request=3,
            branch=2,
            start=4,
            draft=(7, 8),
            deadline_ms=1500,
            chunk=ContextChunk(
                branch=2, start=5, count=1, data=b"\x00\x3c\x00\xc0", crc32=0x97510158, dtype="int8"
            ),
            trusted=(1,),
        ),
        b"\x89\xa4type\xa6verify\xa7session\xa2s1\xa7request\x03\xa6branch\x02\xa5start\x04"
        b"\xa5draft\x92\x07\x08\xabdeadline_ms\xcd\x05\xdc"
        b"\xa5chunk\x86\xa6branch\x02\xa5start\x05\xa5count\x01"
        b"\xa4data\xc4\x04\x00\x3c\x00\xc0\xa5crc32\xce\x97\x51\x01\x58\xa5dtype\xa4int8"
        b"\xa7trusted\x91\x01",
    ),
    (
        Verified(
            session="s1",
            request=3,
            start=41,
            accepted=1,
            token_id=None,
            logprobs=(-0.5,),
            busy_ms=2.0,
        ),
        b"\x88\xa4type\xa8verified\xa7session\xa2s1\xa7request\x03\xa5start\x29\xa8accepted\x01"
        b"\xa8token_id\xc0\xa8logprobs\x91\xcb\xbf\xe0\0\0\0\0\0\0\xa7busy_ms\xcb\x40\0\0\0\0\0\0\0",
    ),
    (
        Verified(
            session="s1",
            request=3,
            start=41,
            accepted=1,
            token_id=None,
            logprobs=(-0.5,),
            busy_ms=2.0,
            top=(((7, -0.5), (9, -2.0)),),
        ),
        b"\x89\xa4type\xa8verified\xa7session\xa2s1\xa7request\x03\xa5start\x29\xa8accepted\x01"
        b"\xa8token_id\xc0\xa8logprobs\x91\xcb\xbf\xe0\0\0\0\0\0\0\xa7busy_ms\xcb\x40\0\0\0\0\0\0\0"
        b"\xa3top\x91\x92\x92\x07\xcb\xbf\xe0\0\0\0\0\0\0\x92\x09\xcb\xc0\0\0\0\0\0\0\0",
    ),
    (
        Received("s1", 2, 17),
        b"\x84\xa4type\xa8received\xa7session\xa2s1\xa6branch\x02\xa5count\x11",
    ),
    (Gap("s1", 2, 17), b"\x84\xa4type\xa3gap\xa7session\xa2s1\xa6branch\x02\xa8expected\x11"),
    (
        Refused(
            session="s1", code="no-memory", retry_after_ms=2000, message="try later", worker="w1"
        ),
        b"\x86\xa4type\xa7refused\xa7session\xa2s1\xa4code\xa9no-memory\xaeretry_after_ms\xcd\x07\xd0"
        b"\xa7message\xa9try later\xa6worker\xa2w1",
    ),
    (Close("s1"), b"\x82\xa4type\xa5close\xa7session\xa2s1"),
    (Close("s1", keep=True), b"\x83\xa4type\xa5close\xa7session\xa2s1\xa4keep\xc3"),
]

BROKEN = {
    "nothing": b"",
    "a map cut short": b"\x82\xa4type\xa5close\xa7session",
    "bytes after the map": b"\x82\xa4type\xa5close\xa7session\xa2s1\x00",
    "a byte that msgpack never uses": b"\xc1",
    "a number": b"\x07",
    "a list": b"\x92\xa5close\xa2s1",
    "no type": b"\x81\xa7session\xa2s1",
    "an unknown type": b"\x82\xa4type\xa5party\xa7session\xa2s1",
    "a type for the other side": b"\x83\xa4type\xa3gap\xa7session\xa2s1\xa8expected\x11",
    "a field missing": b"\x81\xa4type\xa5close",
    "a session that is a number": b"\x82\xa4type\xa5close\xa7session\x07",
    "a session with a slash": b"\x82\xa4type\xa5close\xa7session\xa3s/1",
    "a session with a line end": b"\x82\xa4type\xa5close\xa7session\xa3s1\n",
    "text that is not UTF-8": b"\x82\xa4type\xa5close\xa7session\xa2\xff\xff",
    "a verify request whose chunk is a number": b"\x88\xa4type\xa6verify\xa7session\xa2s1"
    b"\xa7request\x03\xa6branch\x02\xa5start\x05\xa5draft\x91\x07\xabdeadline_ms\xcd\x05\xdc\xa5chunk\x07",
    "a key that is a list": b"\x81\x90\x01",
    "an extension type": b"\x82\xa4type\xa5close\xa7session\xd4\x05\x00",
    "a list that claims four thousand million items": b"\xdd\xff\xff\xff\xff",
    "a string that claims four gigabytes": b"\xdb\xff\xff\xff\xff",
    "data that claims four gigabytes": b"\x81\xa4data\xc6\xff\xff\xff\xff",
    "a hundred thousand nested lists": b"\x91" * 100_000,
}

OF_PROTOCOL_3 = {
    "assist": b"\x85\xa4type\xa6assist\xa7session\xa2s1\xa7request\x03\xa8position\x29"
    b"\xabdeadline_ms\xcd\x05\xdc",
    "token": b"\x87\xa4type\xa5token\xa7session\xa2s1\xa7request\x03\xa8position\x29"
    b"\xa8token_id\xcd\xbf\xff\xa7logprob\xcb\xbf\xe0\0\0\0\0\0\0\xa7busy_ms\xcb\x40\0\0\0\0\0\0\0",
}
VERIFY = Verify(session="s1", request=0, branch=0, start=0, draft=(1,), deadline_ms=1500)


def verify(**changes: Any) -> Verify:
    """Return `VERIFY` with these fields changed, which msgspec does not check."""
    return replace(VERIFY, **changes)


def opening(**rules: Any) -> Open:
    """Return an `Open` with these rules, which msgspec does not check."""
    return Open(
        session="s1",
        epoch=0,
        bundle_id="b1",
        protocol=5,
        sampling=Sampling(),
        max_positions=2048,
        deadline_ms=1500,
        rules=ChoiceRules(**rules),
    )


def continuing(**changes: Any) -> Open:
    """Return an `Open` that continues a session, with these fields changed, which msgspec does not
    check.
    """
    earlier = Continuation(session="s0", branch=0, num_positions=8)
    return replace(opening(), continues=replace(earlier, **changes))


OUT_OF_RANGE = [
    opening(min_p=1.5),
    opening(repetition_penalty=0.0),
    opening(repetition_penalty=float("nan")),
    opening(presence_penalty=2.5),
    opening(frequency_penalty=-2.5),
    opening(logit_bias=((-1, 1.0),)),
    opening(logit_bias=((1, 101.0),)),
    opening(logit_bias=((1, float("inf")),)),
    opening(logit_bias=((1, 1.0),) * 301),
    opening(top_logprobs=21),
    continuing(session="S0"),
    continuing(branch=-1),
    continuing(num_positions=-1),
    continuing(num_positions=(1 << 20) + 1),
    verify(request=-1),
    verify(start=-1),
    verify(start=1 << 20),
    verify(deadline_ms=0),
    verify(deadline_ms=600_001),
    verify(session="S1"),
    verify(session="s" * 64),
    Context("s1", ContextChunk(branch=0, start=0, count=0, data=b"", crc32=0)),
    Context("s1", ContextChunk(branch=0, start=0, count=1, data=b"", crc32=1 << 32)),
    Open(
        session="s1",
        epoch=0,
        bundle_id="b1",
        protocol=1,
        sampling=Sampling(temperature=-0.1),
        max_positions=2048,
        deadline_ms=1500,
    ),
    Open(
        session="s1",
        epoch=0,
        bundle_id="b1",
        protocol=1,
        sampling=Sampling(temperature=float("nan")),
        max_positions=2048,
        deadline_ms=1500,
    ),
    Open(
        session="s1",
        epoch=0,
        bundle_id="b1",
        protocol=1,
        sampling=Sampling(temperature=float("inf")),
        max_positions=2048,
        deadline_ms=1500,
    ),
    Open(
        session="s1",
        epoch=0,
        bundle_id="b1",
        protocol=1,
        sampling=Sampling(top_p=0.0),
        max_positions=2048,
        deadline_ms=1500,
    ),
    Open(
        session="s1",
        epoch=0,
        bundle_id="b1",
        protocol=1,
        sampling=Sampling(seed=-1),
        max_positions=2048,
        deadline_ms=1500,
    ),
    Open(
        session="s1",
        epoch=0,
        bundle_id="b1",
        protocol=1,
        sampling=Sampling(seed=1 << 63),
        max_positions=2048,
        deadline_ms=1500,
    ),
    Open(
        session="s1",
        epoch=0,
        bundle_id="b1",
        protocol=1,
        sampling=Sampling(),
        max_positions=0,
        deadline_ms=1500,
    ),
    Open(
        session="s1",
        epoch=0,
        bundle_id="b1",
        protocol=1,
        sampling=Sampling(),
        max_positions=8,
        deadline_ms=1500,
        branch=-1,
    ),
    verify(draft=()),
    verify(draft=(1,) * 65),
    verify(draft=(-1,)),
    verify(branch=-1),
]


@pytest.mark.parametrize(("message", "payload"), WIRE)
def test_a_message_becomes_exactly_these_bytes(message: Message, payload: bytes) -> None:
    assert encode(message) == payload


@pytest.mark.parametrize(("message", "payload"), WIRE)
def test_these_bytes_become_exactly_the_message(message: Message, payload: bytes) -> None:
    assert decode(payload, type(message)) == message


def test_the_table_holds_every_message() -> None:
    assert {type(message) for message, _ in WIRE} == set(Message.__args__)


@pytest.mark.parametrize("payload", BROKEN.values(), ids=BROKEN.keys())
def test_bytes_that_are_no_message_are_refused_in_one_line(payload: bytes) -> None:
    with pytest.raises(
        DecodeError,
        match=r"^expected one of these messages: open, context, verify, close; got \d+",
    ) as e:
        decode_to_worker(payload)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("payload", OF_PROTOCOL_3.values(), ids=OF_PROTOCOL_3.keys())
def test_the_messages_that_only_protocol_3_has_are_refused(payload: bytes) -> None:
    for decode_message in (decode_to_worker, decode_to_device):
        with pytest.raises(DecodeError, match=r"Invalid value '(assist|token)'"):
            decode_message(payload)


@pytest.mark.parametrize("message", OUT_OF_RANGE)
def test_a_field_out_of_range_is_refused(message: Message) -> None:
    with pytest.raises(DecodeError):
        decode_to_worker(encode(message))


def test_unknown_fields_are_ignored_so_that_a_later_version_may_add_some() -> None:
    payload = msgpack.packb(
        {"type": "close", "session": "s1", "reason": "bored", "more": [1, {"a": None}]}
    )
    assert decode_to_worker(payload) == Close("s1")


def test_an_unknown_way_of_sampling_is_refused_and_not_ignored() -> None:
    payload = msgpack.unpackb(
        encode(
            Open(
                session="s1",
                epoch=0,
                bundle_id="b1",
                protocol=1,
                sampling=Sampling(),
                max_positions=8,
                deadline_ms=1500,
            )
        )
    )
    payload["sampling"]["min_p"] = 0.1
    with pytest.raises(DecodeError, match="min_p"):
        decode_to_worker(msgpack.packb(payload))


def test_the_largest_seed_travels() -> None:
    message = Open(
        session="s1",
        epoch=0,
        bundle_id="b1",
        protocol=1,
        sampling=Sampling(seed=(1 << 63) - 1),
        max_positions=8,
        deadline_ms=1500,
    )
    assert decode_to_worker(encode(message)) == message


def test_token_ids_come_back_in_place_of_hidden_states() -> None:
    chunk = pack_token_ids(1, 3, np.array([0, 7, 49151], TOKEN_DTYPE))
    assert (chunk.start, chunk.count, len(chunk.data)) == (3, 3, 3 * TOKEN_BYTES)
    assert unpack_tokens(chunk, 49152) == [0, 7, 49151]
    with pytest.raises(DecodeError, match="the checksum does not match"):
        unpack_tokens(replace(chunk, data=chunk.data[::-1]), 49152)
    with pytest.raises(DecodeError, match="expected token ids below 49151, got 49151"):
        unpack_tokens(chunk, 49151)
    with pytest.raises(DecodeError, match="expected 4 token ids, got 12 bytes"):
        unpack_tokens(replace(chunk, count=4), 49152)
    with pytest.raises(DecodeError, match="expected context in float16 or int8, got 'tokens'"):
        unpack_chunk(chunk, 6)


def test_a_chunk_of_the_largest_size_travels() -> None:
    rows = np.zeros((MAX_CHUNK_BYTES // 128, 64), np.float16)
    message = Context("s1", pack_chunk(0, 0, rows))
    assert decode_to_worker(encode(message)) == message


def test_a_chunk_of_more_than_the_largest_size_is_refused() -> None:
    message = Context(
        "s1", ContextChunk(branch=0, start=0, count=1, data=bytes(MAX_CHUNK_BYTES + 1), crc32=0)
    )
    with pytest.raises(DecodeError):
        decode_to_worker(encode(message))


def test_a_payload_larger_than_any_message_is_refused_before_it_is_read() -> None:
    with pytest.raises(
        OversizedError, match=f"at most {MAX_ENVELOPE_BYTES} bytes, got {MAX_ENVELOPE_BYTES + 1}"
    ):
        decode_to_worker(bytes(MAX_ENVELOPE_BYTES + 1))


def test_hidden_states_come_back_bit_for_bit() -> None:
    rows = np.random.default_rng(0).normal(scale=100, size=(7, 64)).astype(np.float16)
    chunk = pack_chunk(0, 3, rows)
    assert (chunk.start, chunk.count) == (3, 7)
    assert np.array_equal(unpack_chunk(chunk, 64), rows)


def test_the_tokens_of_a_chunk_come_back() -> None:
    rows = np.zeros((3, 4), np.float16)
    chunk = pack_chunk(0, 0, rows, tokens=np.array([0, 7, 49151], TOKEN_DTYPE))
    assert unpack_tokens(chunk, 49152) == [0, 7, 49151]
    assert not unpack_chunk(chunk, 4).any()
    with pytest.raises(DecodeError, match="the checksum does not match"):
        unpack_chunk(replace(chunk, tokens=chunk.tokens[::-1]), 4)
    with pytest.raises(DecodeError, match="expected token ids below 49151, got 49151"):
        unpack_tokens(chunk, 49151)
    with pytest.raises(DecodeError, match="expected 3 token ids, got 0 bytes"):
        unpack_tokens(pack_chunk(0, 0, rows), 49152)


def test_a_chunk_of_the_largest_size_travels_with_its_tokens() -> None:
    count = MAX_CHUNK_BYTES // (128 + TOKEN_BYTES)
    rows = np.zeros((count, 64), np.float16)
    message = Context("s1", pack_chunk(0, 0, rows, tokens=np.zeros(count, TOKEN_DTYPE)))
    assert decode_to_worker(encode(message)) == message


def test_hidden_states_travel_as_two_bytes_each_little_endian_and_row_by_row() -> None:
    rows = np.array([[1.0, -2.0], [0.5, 734.0]], dtype=">f2")
    assert pack_chunk(0, 0, rows.T).data == bytes.fromhex("003c 0038 00c0 bc61")


ONES = b"\x00\x3c" * 8


@pytest.mark.parametrize(
    ("count", "dtype", "data", "crc32", "reason"),
    [
        (
            2,
            "float32",
            ONES,
            zlib.crc32(ONES),
            "expected context in float16 or int8, got 'float32'",
        ),
        (3, "float16", ONES, zlib.crc32(ONES), "expected 3 x 4 float16 values"),
        (2, "float16", ONES[1:], zlib.crc32(ONES[1:]), "got 15 bytes"),
        (2, "float16", ONES, zlib.crc32(ONES) ^ 1, "the checksum does not match"),
        (2, "float16", b"\x00\x7c" * 8, zlib.crc32(b"\x00\x7c" * 8), "not finite"),
        (2, "float16", b"\x00\x7e" * 8, zlib.crc32(b"\x00\x7e" * 8), "not finite"),
    ],
)
def test_hidden_states_that_are_not_what_the_message_says_are_refused(
    count: int, dtype: str, data: bytes, crc32: int, reason: str
) -> None:
    with pytest.raises(DecodeError, match=reason):
        unpack_chunk(
            ContextChunk(branch=0, start=0, count=count, data=data, crc32=crc32, dtype=dtype), 4
        )
