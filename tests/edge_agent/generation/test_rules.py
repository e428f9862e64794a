"""The rules of a request at the exits of a device."""

from __future__ import annotations

import numpy as np
import pytest

from edge_agent.generation.decoder import Decoder, ExitChoice
from fleet.bundles.manifest import Bundle
from fleet.graphs.cascade import Cascade
from fleet.graphs.partition import LmHeadRun, Partition
from fleet.protocol.messages import NO_RULES, ChoiceRules, Sampling

PROMPT = [5, 9, 300, 17, 42]


@pytest.fixture(scope="module")
def partition(tiny_bundle: Bundle) -> Partition:
    return Partition(tiny_bundle, num_threads=1)


def choose(partition: Partition, rules: ChoiceRules, threshold: float = 0.99) -> ExitChoice:
    decoder = Decoder(partition, 64, (threshold, 1.0), Sampling(), rules=rules)
    decoder.text += PROMPT
    return decoder.choose()


def test_an_exit_is_confident_of_a_token_with_a_large_bias(partition: Partition) -> None:
    plain = choose(partition, NO_RULES)
    assert (plain.exit_layer, plain.is_confident) == (2, False)
    biased = choose(partition, ChoiceRules(logit_bias=((200, 100.0),)))
    assert (biased.token_id, biased.exit_layer, biased.is_confident) == (200, 1, True)
    assert biased.confidence == pytest.approx(1.0)
    assert biased.logprob < plain.logprob


def test_a_token_that_is_lowered_lowers_the_confidence(partition: Partition) -> None:
    plain = choose(partition, NO_RULES, threshold=0.0)
    rules = ChoiceRules(logit_bias=((plain.token_id, -100.0),), top_logprobs=2)
    choice = choose(partition, rules, threshold=0.0)
    assert [token_id for token_id, _ in choice.top] == [plain.token_id, choice.token_id]
    assert choice.top[0][1] == pytest.approx(plain.logprob)
    expected = np.exp(choice.logprob) / (1 - np.exp(plain.logprob))
    assert choice.confidence == pytest.approx(float(expected), rel=1e-3)


def test_a_choice_without_rules_computes_no_single_logit(
    partition: Partition, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(LmHeadRun, "logits_of")
    assert choose(partition, NO_RULES).top == ()
    assert len(choose(partition, ChoiceRules(min_p=0.5, top_logprobs=3)).top) == 3


def test_the_logits_of_single_tokens_are_those_of_the_whole_vocabulary(
    partition: Partition,
) -> None:
    cascade = Cascade(partition, 8)
    cascade.append(PROMPT)
    candidates = cascade.run(0)
    last = len(PROMPT) - 1
    every = cascade.logits_of(0, last, None)
    logprobs = every - np.log(np.exp(every.astype(np.float64)).sum())
    np.testing.assert_allclose(candidates.logprobs, logprobs[candidates.token_ids], atol=1e-4)
    some = np.array([383, 0, 7])
    np.testing.assert_allclose(cascade.logits_of(0, last, some), every[some], rtol=1e-5, atol=1e-5)
