"""Options of an answer: its end and its form, in every mode."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest

from edge_agent.serving import answerer
from fleet.bundles.manifest import Bundle
from fleet.protocol import topics
from fleet.protocol.codec import decode_to_worker
from fleet.protocol.messages import Close
from fleet.protocol.modes import Mode
from fleet.protocol.prompt import PromptRequest
from tests.system.memory_fleet import WAIT_S, MemoryFleet, memory_fleet

NUM_TOKENS = 24
MODES = (Mode.STANDALONE, Mode.COLLABORATIVE, Mode.VERIFIED, Mode.AUTO)


@pytest.fixture(scope="module")
def fleet(tiny_bundle: Bundle) -> Iterator[MemoryFleet]:
    with memory_fleet() as fleet:
        fleet.start_worker(tiny_bundle)
        fleet.start_device(tiny_bundle)
        yield fleet


def request(mode: Mode, **changes: object) -> PromptRequest:
    plain = PromptRequest(
        prompt="Say something about rivers.",
        mode=mode,
        threshold=0.05,
        min_agreement=0.5,
        max_new_tokens=NUM_TOKENS,
        temperature=1.0,
        seed=5,
    )
    return msgspec.structs.replace(plain, **changes)


@pytest.mark.parametrize("mode", MODES)
def test_an_answer_ends_before_its_stop_text(fleet: MemoryFleet, mode: Mode) -> None:
    text = fleet.ask(request(mode, seed=4)).text
    middle = len(text) // 2
    stop = text[middle : middle + 3]
    answer = fleet.ask(request(mode, seed=4, stop=("never there", stop)))
    assert answer.text == answer.last.full_text == text[: text.index(stop)]
    assert answer.last.finish_reason == "stop"
    usage = answer.last.usage
    assert usage is not None
    assert usage.tokens == len(answer.token_ids) < NUM_TOKENS


def test_a_stop_text_ends_the_session_and_drops_the_drafts_beyond(tiny_bundle: Bundle) -> None:
    sent: list[bytes] = []
    with memory_fleet() as fleet:
        fleet.watcher.subscribe(topics.to_worker("+", "+", "+"), lambda _, body: sent.append(body))
        worker, _ = fleet.start_worker(tiny_bundle)
        fleet.start_device(tiny_bundle)
        text = fleet.ask(request(Mode.VERIFIED)).text
        fleet.reports.get(timeout=WAIT_S)
        answer = fleet.ask(request(Mode.VERIFIED, stop=(text[8],)))
        report = fleet.reports.get(timeout=WAIT_S)
        assert answer.text == text[: text.index(text[8])]
        assert (report.finish_reason, report.tokens) == ("stop", len(answer.token_ids))
        assert isinstance(decode_to_worker(sent[-1]), Close)
        worker.engine.check_integrity()


@pytest.mark.parametrize("mode", MODES)
def test_without_stream_the_answer_is_one_reply(fleet: MemoryFleet, mode: Mode) -> None:
    streamed = fleet.ask(request(mode))
    answer = fleet.ask(request(mode, stream=False))
    (reply,) = answer.replies
    assert (reply.seq, reply.done, reply.token_id) == (0, True, None)
    assert reply.text == reply.full_text == streamed.text
    assert reply.generation
    assert reply.finish_reason == streamed.last.finish_reason
    assert reply.usage is not None
    assert reply.usage.tokens == NUM_TOKENS
    assert reply.usage.seed == 5


def test_a_whole_text_that_is_too_long_for_one_reply_comes_in_several(
    fleet: MemoryFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = fleet.ask(request(Mode.STANDALONE)).text
    monkeypatch.setattr(answerer, "MAX_FULL_TEXT_BYTES", 20)
    monkeypatch.setattr(answerer, "MAX_REPLY_CHARACTERS", 5)
    answer = fleet.ask(request(Mode.STANDALONE, stream=False))
    assert len(answer.replies) > 1
    assert answer.text == text
    assert answer.last.full_text is None
