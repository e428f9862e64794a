"""The probability that a draft is accepted, learned from verdicts."""

from __future__ import annotations

import pytest

from edge_agent.generation.acceptance_rate import LOOKUP_PRIOR, AcceptanceRate


@pytest.mark.parametrize("confidence", [0.0, 0.05, 0.5, 0.93, 1.0])
def test_before_any_verdict_a_confidence_speaks_for_itself(confidence: float) -> None:
    assert AcceptanceRate().probability(confidence) == pytest.approx(confidence)


@pytest.mark.parametrize(("accepted", "limit"), [(True, 0.95), (False, 0.05)])
def test_many_verdicts_outweigh_the_confidence(accepted: bool, limit: float) -> None:
    acceptance = AcceptanceRate()
    for _ in range(300):
        acceptance.update(0.5, accepted=accepted)
    assert (acceptance.probability(0.5) > limit) == accepted
    assert acceptance.probability(0.9) == pytest.approx(0.9)


def test_looked_up_tokens_are_counted_apart() -> None:
    acceptance = AcceptanceRate()
    for _ in range(50):
        acceptance.update(None, accepted=True)
    assert acceptance.lookup_probability > LOOKUP_PRIOR
    assert acceptance.probability(0.5) == pytest.approx(0.5)


def test_what_is_long_ago_counts_less() -> None:
    acceptance = AcceptanceRate()
    for accepted in (True, False):
        for _ in range(500):
            acceptance.update(0.5, accepted=accepted)
    assert acceptance.probability(0.5) < 0.15
