"""Rules change logits before a choice as in plain loops over the whole vocabulary."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from fleet.protocol.choice_rules import (
    Float32,
    Int64,
    RankedTokens,
    adjust_logits,
    rank_tokens,
    top_tokens,
)
from fleet.protocol.messages import ChoiceRules

VOCAB = 200
NUM_BEST = 16
PROMPT = [3, 4, 5, 3]
ANSWER = [7, 3, 7]
EVERY: Any = np.arange(VOCAB)


class Logits:
    """Random logits of a position, and the tokens that were asked for in addition."""

    def __init__(self, seed: int, scale: float = 3.0) -> None:
        self.all: Float32 = np.random.default_rng(seed).normal(0, scale, VOCAB).astype(np.float32)
        self.num_whole = 0

    def __call__(self, token_ids: Int64 | None) -> Float32:
        self.num_whole += token_ids is None
        return self.all if token_ids is None else self.all[token_ids]

    def rank(
        self, rules: ChoiceRules, text: list[int], allowed: npt.NDArray[np.bool_] | None = None
    ) -> RankedTokens:
        best: Int64 = np.argsort(-self.all, kind="stable")[:NUM_BEST]
        return rank_tokens(best, self.logprobs[best], rules, text, self, allowed)

    @property
    def logprobs(self) -> Float32:
        return np.asarray(self.all - np.log(np.exp(self.all).sum()), np.float32)


def changed(logits: Float32, rules: ChoiceRules, text: list[int]) -> list[float]:
    """Return the logits of the whole vocabulary after the rules, one at a time."""
    result = [float(logit) for logit in logits]
    answer = text[rules.prompt_length :]
    for token_id in set(text):
        score = result[token_id]
        factor = rules.repetition_penalty
        result[token_id] = score / factor if score > 0 else score * factor
    for token_id in set(answer):
        result[token_id] -= rules.presence_penalty
        result[token_id] -= rules.frequency_penalty * answer.count(token_id)
    for token_id, bias in rules.logit_bias:
        result[token_id] += bias
    return result


RULES = {
    "a penalty for repetition": ChoiceRules(repetition_penalty=1.7),
    "a reward for repetition": ChoiceRules(repetition_penalty=0.3),
    "presence": ChoiceRules(presence_penalty=2.0),
    "a wish for presence": ChoiceRules(presence_penalty=-2.0),
    "frequency": ChoiceRules(frequency_penalty=1.5),
    "a wish for frequency": ChoiceRules(frequency_penalty=-1.5),
    "a bias for and against": ChoiceRules(logit_bias=((9, 4.5), (2, -100.0))),
    "all": ChoiceRules(
        repetition_penalty=1.2,
        presence_penalty=0.5,
        frequency_penalty=0.5,
        logit_bias=((7, 1.0), (190, 8.0)),
    ),
}


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("seed", range(20))
def test_the_best_after_the_rules_is_that_of_the_whole_vocabulary(
    rules: ChoiceRules, seed: int
) -> None:
    logits = Logits(seed)
    source = np.random.default_rng(seed)
    text = [*source.integers(0, VOCAB, 8).tolist(), *np.argsort(-logits.all)[: seed % 6].tolist()]
    expected = changed(logits.all, rules, text)
    ranked = logits.rank(rules, text)
    order = sorted(range(VOCAB), key=lambda i: -expected[i])
    floor = np.sort(logits.all)[-NUM_BEST]
    assert ranked.token_ids.tolist() == [i for i in order if expected[i] >= floor][:NUM_BEST]
    np.testing.assert_allclose(
        ranked.scores, [expected[i] for i in ranked.token_ids], rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(ranked.logprobs, logits.logprobs[ranked.token_ids], atol=1e-5)
    assert logits.num_whole == 0


@pytest.mark.parametrize("seed", range(5))
def test_the_penalty_for_repetition_is_that_of_transformers(seed: int) -> None:
    logits = Logits(seed)
    text = [*PROMPT, *ANSWER]
    adjusted = adjust_logits(EVERY, logits.all, ChoiceRules(repetition_penalty=1.3), text)
    processor = RepetitionPenaltyLogitsProcessor(1.3)
    expected = processor(torch.tensor([text]), torch.from_numpy(logits.all[None].copy()))
    np.testing.assert_allclose(adjusted, expected[0], rtol=1e-6)


def test_presence_and_frequency_count_the_tokens_of_the_response_alone() -> None:
    rules = ChoiceRules(presence_penalty=1.0, frequency_penalty=0.5, prompt_length=len(PROMPT))
    change = adjust_logits(EVERY, np.zeros(VOCAB, np.float32), rules, [*PROMPT, *ANSWER])
    assert {int(i): float(change[i]) for i in np.flatnonzero(change)} == {3: -1.5, 7: -2.0}


def test_without_a_token_before_it_nothing_is_penalized() -> None:
    rules = ChoiceRules(repetition_penalty=2.0, presence_penalty=2.0)
    logits = Logits(0)
    np.testing.assert_array_equal(adjust_logits(EVERY, logits.all, rules, []), logits.all)


def test_when_every_best_token_is_lowered_the_whole_vocabulary_is_ranked() -> None:
    logits = Logits(1)
    best = np.argsort(-logits.all)[:NUM_BEST]
    banned = ChoiceRules(logit_bias=tuple((int(i), -100.0) for i in best))
    ranked = logits.rank(banned, [])
    assert ranked.token_ids.tolist() == np.argsort(-logits.all)[NUM_BEST : 2 * NUM_BEST].tolist()
    assert logits.num_whole == 1


@pytest.mark.parametrize("num_allowed", [1, NUM_BEST, NUM_BEST + 1, VOCAB // 2])
def test_only_allowed_tokens_are_candidates(num_allowed: int) -> None:
    logits = Logits(2)
    worst = np.argsort(logits.all)[:num_allowed]
    allowed = np.isin(EVERY, worst)
    ranked = logits.rank(ChoiceRules(), [], allowed)
    assert ranked.token_ids.tolist() == worst[::-1][:NUM_BEST].tolist()
    probabilities = np.exp(logits.all[worst])
    assert ranked.confidence == pytest.approx(probabilities.max() / probabilities.sum(), rel=1e-5)


def test_the_confidence_is_the_probability_after_the_rules() -> None:
    logits = Logits(3, scale=1.0)
    rules = ChoiceRules(logit_bias=((5, 3.0),))
    scores = np.array(changed(logits.all, rules, []))
    probabilities = np.exp(scores) / np.exp(scores).sum()
    assert logits.rank(rules, []).confidence == pytest.approx(probabilities.max(), rel=1e-4)


def test_the_largest_rules_stay_finite() -> None:
    rules = ChoiceRules(
        repetition_penalty=0.1,
        presence_penalty=-2.0,
        frequency_penalty=-2.0,
        logit_bias=((1, 100.0), (2, -100.0)),
    )
    ranked = Logits(4, scale=30.0).rank(rules, [1] * 10_000)
    assert np.isfinite(ranked.scores).all()
    assert ranked.token_ids[0] == 1
    assert ranked.confidence == 1.0


def test_the_top_tokens_are_pairs_best_first() -> None:
    ids = np.array([4, 2, 9])
    logprobs = np.array([-0.5, -1.0, -2.0], np.float32)
    assert top_tokens(ids, logprobs, 2) == ((4, -0.5), (2, -1.0))
    assert top_tokens(ids, logprobs, 0) == ()
