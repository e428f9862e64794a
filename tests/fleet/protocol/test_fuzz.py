"""Whatever arrives, only typed errors come out."""

from contextlib import suppress

import msgpack
from hypothesis import given
from hypothesis import strategies as st

from fleet.errors import FleetError, PromptError, ProtocolError
from fleet.protocol.codec import decode_to_device, decode_to_worker, encode, unpack_chunk
from fleet.protocol.hidden_states import CONTEXT_DTYPES
from fleet.protocol.messages import (
    Assist,
    Close,
    Context,
    ContextChunk,
    Gap,
    Message,
    Open,
    Opened,
    Received,
    Refused,
    Sampling,
    ToDevice,
    Token,
    ToWorker,
    Verified,
    Verify,
)
from fleet.protocol.prompt import decode_reply, parse_prompt
from fleet.protocol.report import DeviceStatus, WorkerStatus, decode_report, decode_status

NAMES = st.from_regex(r"[a-z0-9][a-z0-9_-]{0,62}", fullmatch=True)
COUNTS = st.integers(0, (1 << 20) - 1)
DEADLINES = st.integers(1, 600_000)
SAMPLINGS = st.builds(
    Sampling,
    st.floats(0, 5),
    st.floats(0, 1, exclude_min=True),
    st.integers(0, 1000),
    st.integers(0, (1 << 63) - 1),
)
TOKEN_IDS = st.integers(0, (1 << 31) - 1)
DRAFTS = st.lists(TOKEN_IDS, min_size=1, max_size=64).map(tuple)
LOGPROBS = st.floats(allow_nan=False)
LOGPROB_LISTS = st.lists(LOGPROBS, max_size=64).map(tuple)
TIMES = st.floats(0, 1e9)
DTYPE_LISTS = st.lists(st.text(max_size=9), min_size=1, max_size=3).map(tuple)
CHUNKS = st.builds(
    ContextChunk,
    COUNTS,
    COUNTS,
    st.integers(1, 100),
    st.binary(max_size=99),
    COUNTS,
    st.text(max_size=9),
)
TO_WORKER = st.one_of(
    st.builds(
        Open, NAMES, COUNTS, NAMES, COUNTS, SAMPLINGS, st.integers(1, 1 << 20), DEADLINES, COUNTS
    ),
    st.builds(Context, NAMES, CHUNKS),
    st.builds(Assist, NAMES, COUNTS, COUNTS, DEADLINES, st.none() | CHUNKS),
    st.builds(Verify, NAMES, COUNTS, COUNTS, COUNTS, DRAFTS, DEADLINES, st.none() | CHUNKS),
    st.builds(Close, NAMES),
)
TO_DEVICE = st.one_of(
    st.builds(
        Opened,
        NAMES,
        NAMES,
        COUNTS,
        st.integers(1024, 256 * 1024),
        st.integers(1024, 1 << 40),
        DTYPE_LISTS,
    ),
    st.builds(Token, NAMES, COUNTS, COUNTS, TOKEN_IDS, LOGPROBS, TIMES),
    st.builds(
        Verified,
        NAMES,
        COUNTS,
        COUNTS,
        st.integers(0, 64),
        st.none() | TOKEN_IDS,
        LOGPROB_LISTS,
        TIMES,
    ),
    st.builds(Received, NAMES, COUNTS, COUNTS),
    st.builds(Gap, NAMES, COUNTS, COUNTS),
    st.builds(Refused, NAMES, NAMES, COUNTS, st.text(max_size=1000), st.none() | NAMES),
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=20)
    | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=8))
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)
FIELDS = sorted(
    {field for message in Message.__args__ for field in message.__struct_fields__} | {"type"}
)
TYPES = [message.__name__.lower() for message in Message.__args__]
ODD_MESSAGES = st.builds(
    lambda kind, fields: fields | {"type": kind},
    st.sampled_from(TYPES),
    st.dictionaries(st.sampled_from(FIELDS), VALUES | NAMES | COUNTS),
)


@given(TO_WORKER)
def test_a_message_to_a_worker_comes_back_as_it_was(message: ToWorker) -> None:
    assert decode_to_worker(encode(message)) == message


@given(TO_DEVICE)
def test_a_message_to_a_device_comes_back_as_it_was(message: ToDevice) -> None:
    assert decode_to_device(encode(message)) == message


@given(st.binary(max_size=200))
def test_any_bytes_give_a_message_or_a_protocol_error(payload: bytes) -> None:
    with suppress(ProtocolError):
        decode_to_worker(payload)
    with suppress(ProtocolError):
        decode_to_device(payload)


@given(ODD_MESSAGES)
def test_any_fields_of_any_type_give_a_message_or_a_protocol_error(
    fields: dict[str, object],
) -> None:
    payload = msgpack.packb(fields)
    with suppress(ProtocolError):
        decode_to_worker(payload)
    with suppress(ProtocolError):
        decode_to_device(payload)


@given(TO_WORKER | TO_DEVICE, st.data())
def test_a_message_with_one_byte_changed_gives_a_message_or_a_protocol_error(
    message: ToWorker | ToDevice, data: st.DataObject
) -> None:
    payload = bytearray(encode(message))
    payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    with suppress(ProtocolError):
        decode_to_worker(bytes(payload))
    with suppress(ProtocolError):
        decode_to_device(bytes(payload))


DTYPES = st.text(max_size=9) | st.sampled_from(CONTEXT_DTYPES)


@given(
    st.builds(ContextChunk, COUNTS, COUNTS, COUNTS, st.binary(max_size=99), COUNTS, DTYPES), COUNTS
)
def test_any_chunk_gives_hidden_states_or_a_protocol_error(
    chunk: ContextChunk, hidden_size: int
) -> None:
    with suppress(ProtocolError):
        unpack_chunk(chunk, hidden_size)


@given(st.binary(max_size=200) | VALUES.map(msgpack.packb))
def test_any_report_is_one_or_a_protocol_error(payload: bytes) -> None:
    with suppress(ProtocolError):
        decode_report(payload)


JSON_BYTES = st.one_of(
    st.binary(max_size=100),
    st.binary(max_size=100).map(lambda data: b'{"prompt":"' + data),
    st.binary(max_size=20).map(lambda data: b'{"prompt":"' + data + b'"}'),
    st.text(max_size=20).map(
        lambda text: f'{{"seq":1,"online":true,"epoch":1,"mode":"{text}"}}'.encode()
    ),
    st.just(b'{"prompt":' * 100_000),
    st.just(b'{"x":' + b"[" * 100_000),
)


@given(JSON_BYTES)
def test_any_payload_on_a_prompt_topic_is_a_request_or_a_prompt_error(payload: bytes) -> None:
    with suppress(PromptError):
        parse_prompt(payload)


@given(JSON_BYTES)
def test_any_payload_on_a_reply_topic_is_a_reply_or_a_prompt_error(payload: bytes) -> None:
    with suppress(PromptError):
        decode_reply(payload)


@given(JSON_BYTES)
def test_any_payload_on_a_status_topic_is_a_status_or_a_typed_error(payload: bytes) -> None:
    with suppress(FleetError):
        decode_status(payload, DeviceStatus)
    with suppress(FleetError):
        decode_status(payload, WorkerStatus)
