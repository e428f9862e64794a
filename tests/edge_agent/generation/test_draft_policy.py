"""The draft policy, against every fixed number of drafts."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

import pytest

from edge_agent.generation.draft_policy import MIN_SURVIVAL, worth_drafting, worth_guessing

STEP_S = 1.0
NUM_TOKENS = 3000

IsWorth = Callable[[int, float], bool]


def seconds_a_token(chance: float, round_trip_s: float, is_worth: IsWorth) -> float:
    """Return the time of a device whose drafts are each accepted with probability `chance`, that
    drafts on while it waits.

    `is_worth` says of so many drafts, all accepted with a probability, whether to draft another one
    before asking.
    """
    draw = random.Random(0)
    now = 0.0
    num_certain = 0
    drafts: list[bool] = []
    while num_certain < NUM_TOKENS:
        while not drafts or is_worth(len(drafts), chance ** len(drafts)):
            drafts.append(draw.random() < chance)
            now += STEP_S
        asked = len(drafts)
        answered_at = now + round_trip_s
        while now < answered_at and worth_guessing(
            chance ** len(drafts), STEP_S, answered_at - now
        ):
            drafts.append(draw.random() < chance)
            now += STEP_S
        now = max(now, answered_at)
        if all(drafts[:asked]):
            num_certain = num_certain + asked
            drafts = drafts[asked:]
        else:
            num_certain = num_certain + drafts.index(False) + 1
            drafts = []
    return now / num_certain


def is_shorter(length: int, num_drafts: int, survival: float) -> bool:
    del survival
    return num_drafts < length


@pytest.mark.parametrize("chance", [0.3, 0.5, 0.7, 0.8])
@pytest.mark.parametrize("round_trip_s", [0.5, 2.0, 4.0, 10.0])
def test_the_stop_is_nearly_as_good_as_the_best_fixed_length(
    chance: float, round_trip_s: float
) -> None:
    taken = seconds_a_token(
        chance, round_trip_s, lambda _, survival: worth_drafting(survival, STEP_S, round_trip_s)
    )
    fixed = [partial(is_shorter, length) for length in (1, 2, 3, 4, 6, 8, 12)]
    best = min(seconds_a_token(chance, round_trip_s, is_worth) for is_worth in fixed)
    assert taken <= 1.11 * best


def test_an_unlikely_draft_ends_a_run() -> None:
    assert worth_drafting(0.9, 0.02, 0.06)
    assert not worth_drafting(0.1, 0.02, 0.06)


def test_a_slow_link_makes_longer_runs() -> None:
    assert not worth_drafting(0.4, 0.02, 0.02)
    assert worth_drafting(0.4, 0.02, 1.0)


def test_over_a_link_that_is_faster_than_a_step_only_a_likely_draft_is_followed() -> None:
    assert not worth_guessing(0.5, 0.04, 0.01)
    assert worth_guessing(0.9, 0.04, 0.01)
    assert worth_guessing(0.2, 0.01, 0.04)
    assert not worth_guessing(MIN_SURVIVAL / 2, 0.01, 0.04)
    assert not worth_guessing(0.99, 0.04, 0.0)
