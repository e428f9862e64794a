"""When to stop drafting, against the best length of a run by brute force."""

from __future__ import annotations

import pytest

from edge_agent.drafting import expected_tokens, worth_drafting


@pytest.mark.parametrize(
    ("chances", "tokens"),
    [([], 0.0), ([1.0], 1.0), ([0.0], 1.0), ([0.5], 1.0), ([1.0, 1.0], 2.0), ([0.5, 0.5], 1.5), ([0.9, 0.0], 1.9)],
)
def test_a_verdict_gives_the_accepted_tokens_or_one_more_where_one_is_rejected(
    chances: list[float], tokens: float
) -> None:
    assert expected_tokens(chances) == pytest.approx(tokens)


@pytest.mark.parametrize("chance", [0.3, 0.6, 0.8, 0.9, 0.97])
@pytest.mark.parametrize("round_trip_s", [0.001, 0.02, 0.05, 0.2, 1.0])
def test_the_stop_is_at_the_most_tokens_a_second(chance: float, round_trip_s: float) -> None:
    step_s = 0.02
    length = 1
    while length < 200 and worth_drafting([chance] * length, length * step_s, step_s, round_trip_s):
        length += 1
    rates = {k: expected_tokens([chance] * k) / (k * step_s + round_trip_s) for k in range(1, 201)}
    assert rates[length] == pytest.approx(max(rates.values()), rel=1e-6)


def test_an_unlikely_draft_ends_a_run_that_went_well() -> None:
    assert worth_drafting([0.95, 0.95], 0.04, 0.02, 0.05)
    assert not worth_drafting([0.95, 0.1], 0.04, 0.02, 0.05)


def test_a_slow_link_makes_longer_runs() -> None:
    assert not worth_drafting([0.8] * 4, 0.08, 0.02, 0.005)
    assert worth_drafting([0.8] * 4, 0.08, 0.02, 1.0)
