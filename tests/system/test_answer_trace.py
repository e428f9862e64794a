"""The trace of an answer equals the answer, in every mode, also when the cloud is lost."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest
from msgspec.structs import replace

from edge_agent.config import AgentConfig
from fleet.bundles.manifest import Bundle
from fleet.errors import PromptError
from fleet.protocol import topics
from fleet.protocol.answer_trace import (
    MAX_EVENTS,
    MAX_TEXT_LENGTH,
    ReplyTrace,
    TraceEvent,
    TraceEventKind,
)
from fleet.protocol.modes import CLOUD, FALLBACK, LOOKUP, Mode, exit_source
from fleet.protocol.prompt import PromptRequest, Reply, Usage, decode_reply, parse_prompt
from tests.system.memory_fleet import APP, DEVICE, Answer, MemoryFleet, memory_fleet

MODES = (Mode.STANDALONE, Mode.COLLABORATIVE, Mode.VERIFIED, Mode.AUTO)
SENT = (TraceEventKind.OPEN, TraceEventKind.UPLOAD, TraceEventKind.VERIFY, TraceEventKind.CLOSE)
ARRIVED = (
    TraceEventKind.OPENED,
    TraceEventKind.RECEIPT,
    TraceEventKind.VERDICT,
    TraceEventKind.REFUSED,
)


@pytest.fixture(scope="module")
def fleet(tiny_bundle: Bundle) -> Iterator[MemoryFleet]:
    with memory_fleet() as fleet:
        fleet.start_worker(tiny_bundle)
        fleet.start_device(tiny_bundle, AgentConfig(num_threads=1, assist_deadline_ms=60_000))
        yield fleet


def request(mode: Mode, **changes: object) -> PromptRequest:
    plain = PromptRequest(
        prompt="one two three one two three one two",
        mode=mode,
        threshold=0.05,
        min_agreement=1.0,
        max_new_tokens=32,
        ignore_eos=True,
        seed=5,
        trace=True,
    )
    return replace(plain, **changes)


def traces_of(answer: Answer) -> list[ReplyTrace]:
    traces = [reply.trace for reply in answer.replies]
    assert None not in traces
    return [trace for trace in traces if trace]


def events_of(answer: Answer, *kinds: TraceEventKind) -> list[TraceEvent]:
    events = [event for trace in traces_of(answer) for event in trace.events]
    return [event for event in events if not kinds or event.kind in kinds]


def usage_of(answer: Answer) -> Usage:
    assert answer.last.usage
    return answer.last.usage


def check_token(reply: Reply, trace: ReplyTrace) -> None:
    """Check that the trace of a token agrees with its source and its confidence."""
    assert trace.logprob is not None
    if trace.verdict == "corrected":
        assert (reply.source, trace.exit_layer) == (CLOUD, None)
    if trace.verdict is None:
        assert reply.source != CLOUD
        assert trace.request is None
    if trace.exit_layer is not None:
        assert reply.confidence is not None
        assert reply.source in (exit_source(trace.exit_layer), CLOUD, FALLBACK)
    if reply.source == LOOKUP:
        assert trace.is_proposed


def check_trace(answer: Answer) -> None:
    """Check that the trace agrees with the replies and the counts of an answer."""
    usage = usage_of(answer)
    traces = traces_of(answer)
    tokens = [
        (reply, trace)
        for reply, trace in zip(answer.replies, traces, strict=True)
        if reply.token_id is not None
    ]
    for reply, trace in tokens:
        check_token(reply, trace)
    assert len(tokens) == usage.tokens
    assert [trace.at_ms for trace in traces] == sorted(trace.at_ms for trace in traces)
    sent = events_of(answer, *SENT)
    assert sum(event.num_bytes for event in sent) == usage.bytes_up
    assert sum(event.num_bytes for event in events_of(answer, *ARRIVED)) == usage.bytes_down
    verdicts = {event.request for event in events_of(answer, TraceEventKind.VERDICT)}
    assert {trace.request for _, trace in tokens if trace.verdict} <= verdicts
    assert len(verdicts) <= usage.round_trips
    assert not any(trace.omitted for trace in traces)
    assert events_of(answer)[0].kind is TraceEventKind.QUEUE
    assert events_of(answer, TraceEventKind.STEP)


@pytest.mark.parametrize("mode", MODES)
def test_the_trace_equals_the_answer_and_does_not_change_it(fleet: MemoryFleet, mode: Mode) -> None:
    traced = fleet.ask(request(mode))
    plain = fleet.ask(request(mode, trace=False))
    check_trace(traced)
    assert traced.last.error is None
    if mode is not Mode.AUTO:  # its choice depends on measured times
        assert traced.token_ids == plain.token_ids
    assert not any(reply.trace for reply in plain.replies)


def test_every_token_of_a_verified_answer_has_a_verdict(fleet: MemoryFleet) -> None:
    answer = fleet.ask(request(Mode.VERIFIED))
    traces = [trace for trace in traces_of(answer) if trace.logprob is not None]
    assert {trace.verdict for trace in traces} <= {"accepted", "corrected"}
    corrected = sum(trace.verdict == "corrected" for trace in traces)
    assert corrected == usage_of(answer).sources.get(CLOUD, 0)
    settled = events_of(answer, TraceEventKind.SETTLE)
    assert sum(event.kept for event in settled) >= len(traces) - corrected
    for event in settled:
        assert len(event.dropped) == event.drafts - event.kept
    verifies = events_of(answer, TraceEventKind.VERIFY)
    assert len({event.request for event in verifies}) == usage_of(answer).round_trips


def test_a_trace_alone_has_no_messages(fleet: MemoryFleet) -> None:
    answer = fleet.ask(request(Mode.STANDALONE))
    assert not events_of(answer, *SENT, *ARRIVED)
    assert sum(event.positions for event in events_of(answer, TraceEventKind.STEP)) > 0


def test_the_trace_of_a_constrained_answer(fleet: MemoryFleet) -> None:
    for mode in (Mode.STANDALONE, Mode.VERIFIED):
        answer = fleet.ask(request(mode, regex="[a-z]{4,8}", ignore_eos=False, max_new_tokens=64))
        check_trace(answer)


def test_the_trace_shows_the_loss_of_the_worker(tiny_bundle: Bundle) -> None:
    with memory_fleet() as fleet:
        _, link = fleet.start_worker(tiny_bundle)
        fleet.start_device(tiny_bundle, AgentConfig(num_threads=1, assist_deadline_ms=60_000))
        asked = request(Mode.COLLABORATIVE, threshold=1.0, max_new_tokens=64)
        answer = fleet.ask(asked, fault=link.drop)
        lost = events_of(answer, TraceEventKind.LOST)
        assert answer.last.note in [event.text for event in lost]
        assert usage_of(answer).sources[FALLBACK] > 0
        tokens = [reply for reply in answer.replies if reply.token_id is not None]
        for reply in tokens:
            assert reply.trace
            check_token(reply, reply.trace)


def test_a_request_without_a_worker_fails_with_its_trace(tiny_bundle: Bundle) -> None:
    with memory_fleet() as fleet:
        fleet.start_device(tiny_bundle, AgentConfig(num_threads=1))
        topic = topics.device_prompt(DEVICE, APP, "r1")
        fleet.watcher.publish(topic, msgspec.json.encode(request(Mode.VERIFIED, deadline_ms=300)))
        reply = fleet.next_reply("r1")
        assert reply.error
        assert reply.trace
        assert [event.kind for event in reply.trace.events][:1] == [TraceEventKind.QUEUE]


def test_a_trace_needs_a_stream() -> None:
    with pytest.raises(PromptError, match="'stream' true with 'trace'"):
        parse_prompt(b'{"prompt": "hi", "trace": true, "stream": false}')
    with pytest.raises(PromptError, match="'stream' false with 'n' 2"):
        parse_prompt(b'{"prompt": "hi", "trace": true, "n": 2}')


def test_no_trace_adds_no_bytes() -> None:
    assert b"trace" not in msgspec.json.encode(PromptRequest(prompt="hi"))
    assert b"trace" not in msgspec.json.encode(Reply(seq=0, text="hi", token_id=1))


EVENT = {"kind": "step", "at_ms": 1}
HOSTILE = {
    "a text of a megabyte": {"events": [EVENT | {"text": "x" * (1 << 20)}]},
    "long text": {"events": [EVENT | {"text": "x" * (MAX_TEXT_LENGTH + 1)}]},
    "too many events": {"events": [EVENT] * (MAX_EVENTS + 1)},
    "too many drafts": {"events": [EVENT | {"dropped": ["a"] * 1000}]},
    "a huge time": {"at_ms": 1e300},
    "a huge count": {"events": [EVENT | {"num_bytes": 1 << 60}]},
    "negative": {"at_ms": -1},
    "another kind": {"events": [{"kind": "<script>", "at_ms": 1}]},
    "another type": {"logprob": "low"},
    "a positive logprob": {"logprob": 1},
    "no list": {"events": {"kind": "step"}},
}


@pytest.mark.parametrize("fields", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_trace_is_refused(fields: dict[str, object]) -> None:
    body = {"seq": 0, "trace": {"at_ms": 1.0} | fields}
    with pytest.raises(PromptError, match="expected a reply in JSON"):
        decode_reply(msgspec.json.encode(body))
