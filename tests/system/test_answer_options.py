"""Options of an answer: its end and its form, in every mode."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec
import pytest
import torch
from msgspec.structs import replace

from benchmarks.whole_model import WholeModel
from edge_agent.config import AgentConfig
from edge_agent.serving import answerer
from fleet.bundles.manifest import Bundle
from fleet.errors import RefusedPromptError
from fleet.protocol import topics
from fleet.protocol.codec import decode_to_worker
from fleet.protocol.messages import Close
from fleet.protocol.modes import Mode
from fleet.protocol.prompt import PromptRequest, TokenLogprob
from tests.conftest import MakeTinyBundle
from tests.system.memory_fleet import DEVICE, WAIT_S, MemoryFleet, memory_fleet

NUM_TOKENS = 24
MODES = (Mode.STANDALONE, Mode.COLLABORATIVE, Mode.VERIFIED, Mode.AUTO)


@pytest.fixture(scope="module")
def fleet(tiny_bundle: Bundle) -> Iterator[MemoryFleet]:
    with memory_fleet() as fleet:
        fleet.start_worker(tiny_bundle)
        # A slow machine must not make a fallback of a token.
        fleet.start_device(tiny_bundle, AgentConfig(num_threads=1, assist_deadline_ms=20_000))
        yield fleet


@pytest.fixture(scope="module")
def whole(tiny_bundle: Bundle) -> WholeModel:
    return WholeModel(tiny_bundle, num_threads=1)


def request(mode: Mode, **changes: object) -> PromptRequest:
    plain = PromptRequest(
        prompt="Say something about rivers.",
        mode=mode,
        threshold=0.05,
        min_agreement=1.0,
        max_new_tokens=NUM_TOKENS,
        temperature=1.0,
        seed=5,
    )
    return replace(plain, **changes)


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


RULES: dict[str, dict[str, object]] = {
    "a penalty for repetition": {"repetition_penalty": 1.8},
    "a reward for repetition": {"repetition_penalty": 0.5},
    "presence": {"presence_penalty": 2.0},
    "frequency": {"frequency_penalty": 2.0},
    "a wish for frequency": {"frequency_penalty": -2.0},
    "a bias": {"logit_bias": {"70": 5.0, "71": -100.0, "300": 6.0}},
    "min_p": {"min_p": 0.4},
    "all": {
        "repetition_penalty": 1.2,
        "presence_penalty": 1.0,
        "frequency_penalty": 0.5,
        "logit_bias": {"65": 3.0},
        "min_p": 0.05,
    },
}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES.keys())
def test_a_verified_text_is_the_whole_models_under_the_same_rules(
    fleet: MemoryFleet, whole: WholeModel, rules: dict[str, object], temperature: float
) -> None:
    asked = request(Mode.VERIFIED, temperature=temperature, **rules)
    answer = fleet.ask(asked)
    assert asked.prompt
    choice_rules = asked.choice_rules(len(whole.prompt_ids(asked.prompt)))
    expected = whole.generate(asked.prompt, NUM_TOKENS, asked.sampling, choice_rules)
    assert answer.token_ids == expected
    plain = fleet.ask(request(Mode.VERIFIED, temperature=temperature))
    assert answer.token_ids != plain.token_ids or (temperature == 0.0 and "min_p" in rules)


def test_a_whole_model_on_the_device_answers_by_the_same_rules(
    make_tiny_bundle: MakeTinyBundle,
) -> None:
    """The device computes the logits of tokens beyond its candidates by itself."""
    bundle = make_tiny_bundle((1, 2, 3, 4), split=2, upload_layer=(1, 2, 3))
    whole = WholeModel(bundle, num_threads=1)
    with memory_fleet() as fleet:
        fleet.start_device(bundle, AgentConfig(num_threads=1, split=4))
        for rules in RULES.values():
            asked = request(Mode.STANDALONE, threshold=1.0, **rules)
            answer = fleet.ask(asked)
            assert asked.prompt
            choice_rules = asked.choice_rules(len(whole.prompt_ids(asked.prompt)))
            expected = whole.generate(asked.prompt, NUM_TOKENS, asked.sampling, choice_rules)
            assert answer.token_ids == expected


def test_log_probabilities_are_the_models_before_the_rules(
    fleet: MemoryFleet, whole: WholeModel
) -> None:
    asked = request(
        Mode.VERIFIED, logprobs=True, top_logprobs=4, logit_bias={"70": 8.0}, temperature=0.5
    )
    answer = fleet.ask(asked)
    assert asked.prompt
    rules = asked.choice_rules(len(whole.prompt_ids(asked.prompt)))
    steps = list(whole.steps(asked.prompt, NUM_TOKENS, asked.sampling, rules))
    entries = [reply.logprobs for reply in answer.replies[:-1]]
    assert len(entries) == len(steps) == NUM_TOKENS
    for entry, reply, (token_id, logits) in zip(entries, answer.replies, steps, strict=False):
        assert entry is not None
        (token,) = entry
        logprobs = torch.log_softmax(logits, -1)
        best, ids = logprobs.topk(4)
        assert token.token_id == reply.token_id == token_id
        assert token.logprob == pytest.approx(float(logprobs[token_id]), abs=2e-3)
        assert [each.token_id for each in token.top] == ids.tolist()
        got = torch.tensor([each.logprob for each in token.top])
        torch.testing.assert_close(got, best, atol=2e-3, rtol=0)
    names = whole.tokenizer.token_text
    assert all(entry and entry[0].token == names(entry[0].token_id) for entry in entries)
    assert answer.last.logprobs is None


@pytest.mark.parametrize("mode", MODES)
def test_one_reply_has_the_log_probabilities_of_all_tokens(fleet: MemoryFleet, mode: Mode) -> None:
    streamed = fleet.ask(request(mode, logprobs=True, top_logprobs=20))
    answer = fleet.ask(request(mode, logprobs=True, top_logprobs=20, stream=False))
    entries = answer.last.logprobs or ()
    assert token_ids(entries) == streamed.token_ids
    assert all(entry.logprob <= 0.0 for entry in entries)
    assert {len(entry.top) for entry in entries} == {20}
    assert not any(reply.logprobs for reply in fleet.ask(request(mode)).replies)


def token_ids(logprobs: Sequence[TokenLogprob] | None) -> list[int]:
    return [entry.token_id for entry in logprobs or ()]


@pytest.mark.parametrize("mode", [Mode.STANDALONE, Mode.VERIFIED])
def test_each_choice_is_the_answer_to_its_own_seed(fleet: MemoryFleet, mode: Mode) -> None:
    asked = request(mode, seed=(1 << 63) - 2, n=3, stream=False, logprobs=True)
    answer = fleet.ask(asked)
    choices = answer.last.choices or ()
    assert [choice.index for choice in choices] == [0, 1, 2]
    for choice, seed in zip(choices, ((1 << 63) - 2, (1 << 63) - 1, 0), strict=True):
        alone = fleet.ask(request(mode, seed=seed, logprobs=True, stream=False)).last
        assert choice.full_text == alone.full_text
        assert choice.finish_reason == alone.finish_reason
        assert token_ids(choice.logprobs) == token_ids(alone.logprobs)
    assert len({choice.full_text for choice in choices}) == 3
    (reply,) = answer.replies
    assert (reply.text, reply.full_text, reply.logprobs) == ("", None, None)
    usage = reply.usage
    assert usage is not None
    assert (usage.tokens, usage.seed) == (3 * NUM_TOKENS, (1 << 63) - 2)


def test_each_choice_is_reported_once_and_its_session_is_closed(tiny_bundle: Bundle) -> None:
    with memory_fleet() as fleet:
        worker, _ = fleet.start_worker(tiny_bundle)
        fleet.start_device(tiny_bundle)
        answer = fleet.ask(request(Mode.VERIFIED, n=2, stream=False))
        reports = [fleet.reports.get(timeout=WAIT_S) for _ in range(2)]
        worker.engine.check_integrity()
    assert len({report.generation for report in reports}) == 2
    usage = answer.last.usage
    assert usage is not None
    assert usage.tokens == sum(report.tokens for report in reports)
    assert usage.bytes_up == sum(report.bytes_up for report in reports)
    assert reports[0].generation == answer.last.generation


def test_the_choices_of_a_cancelled_answer_are_cancelled(fleet: MemoryFleet) -> None:
    asked = request(Mode.STANDALONE, n=4, stream=False, max_new_tokens=400)
    topic = topics.device_prompt(DEVICE, fleet.watcher.name, "choices")
    fleet.watcher.publish(topic, msgspec.json.encode(asked), qos=1)
    fleet.watcher.publish(topics.device_cancel(DEVICE, fleet.watcher.name, "choices"), b"x", qos=1)
    reply = fleet.next_reply("choices")
    assert reply.finish_reason == "cancelled"
    assert reply.choices
    assert {choice.finish_reason for choice in reply.choices[1:]} == {"cancelled"}


def test_more_log_probabilities_than_one_reply_holds_are_refused(fleet: MemoryFleet) -> None:
    many = request(Mode.STANDALONE, logprobs=True, top_logprobs=20, max_new_tokens=391)
    with pytest.raises(RefusedPromptError, match=r"at most 8192 .* got 8211: 391 tokens with 20"):
        fleet.ask(replace(many, stream=False))


def test_a_bias_of_no_token_is_refused(fleet: MemoryFleet) -> None:
    with pytest.raises(RefusedPromptError, match="token ids below 384 in 'logit_bias', got 384"):
        fleet.ask(request(Mode.STANDALONE, logit_bias={"384": 1.0}))


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
