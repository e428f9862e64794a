"""Arbitrary payloads raise typed errors only."""

import zlib
from contextlib import suppress

import msgpack
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET

from fleet.errors import FleetError, PromptError, ProtocolError
from fleet.protocol.codec import (
    decode_to_device,
    decode_to_worker,
    encode,
    unpack_chunk,
    unpack_tokens,
)
from fleet.protocol.hidden_states import CONTEXT_DTYPES, TOKENS
from fleet.protocol.messages import (
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
    ToDevice,
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
TOP_TOKENS = st.lists(st.tuples(TOKEN_IDS, LOGPROBS), max_size=20).map(tuple)
TIMES = st.floats(0, 1e9)
DTYPE_LISTS = st.lists(st.text(max_size=9), min_size=1, max_size=3).map(tuple)
CHUNKS = st.builds(
    ContextChunk,
    branch=COUNTS,
    start=COUNTS,
    count=st.integers(1, 100),
    data=st.binary(max_size=99),
    crc32=COUNTS,
    dtype=st.text(max_size=9),
    tokens=st.binary(max_size=99),
)
PENALTIES = st.floats(-2, 2)
RULES = st.builds(
    ChoiceRules,
    min_p=st.floats(0, 1),
    repetition_penalty=st.floats(0.1, 10),
    presence_penalty=PENALTIES,
    frequency_penalty=PENALTIES,
    logit_bias=st.lists(st.tuples(TOKEN_IDS, st.floats(-100, 100)), max_size=9).map(tuple),
    prompt_length=COUNTS,
    top_logprobs=st.integers(0, 20),
)
CONTINUATIONS = st.builds(Continuation, session=NAMES, branch=COUNTS, num_positions=COUNTS)
OPENS = st.builds(
    Open,
    session=NAMES,
    epoch=COUNTS,
    bundle_id=NAMES,
    protocol=COUNTS,
    sampling=SAMPLINGS,
    max_positions=st.integers(1, 1 << 20),
    deadline_ms=DEADLINES,
    branch=COUNTS,
    upload_layer=st.just(UNSET) | st.integers(1, 9999),
    rules=st.just(UNSET) | RULES,
    continues=st.just(UNSET) | CONTINUATIONS,
)
VERIFIES = st.builds(
    Verify,
    session=NAMES,
    request=COUNTS,
    branch=COUNTS,
    start=COUNTS,
    draft=DRAFTS,
    deadline_ms=DEADLINES,
    chunk=st.none() | CHUNKS,
)
CLOSES = st.builds(Close, NAMES, keep=st.booleans())
TO_WORKER = st.one_of(OPENS, st.builds(Context, NAMES, CHUNKS), VERIFIES, CLOSES)
OPENEDS = st.builds(
    Opened,
    session=NAMES,
    worker=NAMES,
    received=COUNTS,
    max_chunk_bytes=st.integers(1024, 256 * 1024),
    window_bytes=st.integers(1024, 1 << 40),
    dtypes=DTYPE_LISTS,
)
VERIFIEDS = st.builds(
    Verified,
    session=NAMES,
    request=COUNTS,
    start=COUNTS,
    accepted=st.integers(0, 64),
    token_id=st.none() | TOKEN_IDS,
    logprobs=LOGPROB_LISTS,
    busy_ms=TIMES,
    top=st.just(UNSET) | st.lists(TOP_TOKENS, max_size=3).map(tuple),
)
REFUSALS = st.builds(
    Refused,
    session=NAMES,
    code=NAMES,
    retry_after_ms=COUNTS,
    message=st.text(max_size=1000),
    worker=st.none() | NAMES,
)
TO_DEVICE = st.one_of(
    OPENEDS,
    VERIFIEDS,
    st.builds(Received, NAMES, COUNTS, COUNTS),
    st.builds(Gap, NAMES, COUNTS, COUNTS),
    REFUSALS,
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


DTYPES = st.text(max_size=9) | st.sampled_from((*CONTEXT_DTYPES, TOKENS))


@given(
    st.builds(
        ContextChunk,
        branch=COUNTS,
        start=COUNTS,
        count=COUNTS,
        data=st.binary(max_size=99),
        crc32=COUNTS,
        dtype=DTYPES,
    ),
    COUNTS,
)
def test_any_chunk_gives_hidden_states_or_a_protocol_error(
    chunk: ContextChunk, hidden_size: int
) -> None:
    with suppress(ProtocolError):
        unpack_chunk(chunk, hidden_size)
    with suppress(ProtocolError):
        unpack_tokens(chunk, hidden_size)


@given(st.binary(max_size=99), st.integers(0, 30), COUNTS)
def test_any_bytes_are_token_ids_below_the_vocabulary_or_a_protocol_error(
    data: bytes, count: int, vocab_size: int
) -> None:
    chunk = ContextChunk(
        branch=0, start=0, count=count, data=data, crc32=zlib.crc32(data), dtype=TOKENS
    )
    with suppress(ProtocolError):
        token_ids = unpack_tokens(chunk, vocab_size)
        assert len(token_ids) == count
        assert all(token_id < vocab_size for token_id in token_ids)


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
