"""Means that follow what changes and forget single outliers."""

from __future__ import annotations

import random

import pytest

from edge_agent.measurements import Duration, Mean, Measurements


def test_the_first_values_make_a_plain_mean() -> None:
    mean = Mean(weight=0.1)
    for value in (1.0, 2.0, 3.0):
        mean.add(value)
    assert mean.value == pytest.approx(2.0)
    assert mean.count == 3


def test_a_lasting_change_is_followed() -> None:
    mean = Duration(weight=0.1)
    for value in [1.0] * 100 + [30.0] * 100:
        mean.add(value)
    assert mean.value == pytest.approx(30.0, rel=0.01)
    assert mean.deviation < 1.0


def test_one_pause_is_not_a_trend() -> None:
    mean = Duration(weight=0.1)
    for value in [1.0] * 100 + [1000.0]:
        mean.add(value)
    assert mean.value < 1.4


def judge_prompts(measurements: Measurements, ids_s: float, hidden_s: float, count: int) -> int:
    """Upload prompts as the measurements choose; return how many of them as token ids."""
    num_ids = 0
    for _ in range(count):
        has_ids = measurements.is_faster_as_ids()
        num_ids += has_ids
        measurements.prompt_judged(500, ids_s if has_ids else hidden_s, has_ids=has_ids)
    return num_ids


@pytest.mark.parametrize(("ids_s", "expected"), [(0.5, 90), (0.9, 10), (2.0, 10)])
def test_prompts_are_uploaded_as_token_ids_where_that_is_a_fifth_faster(
    ids_s: float, expected: int
) -> None:
    assert judge_prompts(Measurements(), ids_s, 1.0, 100) == pytest.approx(expected, abs=5)


def test_a_link_that_becomes_slow_changes_the_way_of_prompts_and_short_ones_do_not_count() -> None:
    measurements = Measurements()
    judge_prompts(measurements, 0.5, 0.1, 100)
    for _ in range(9):
        measurements.prompt_judged(63, 0.0, has_ids=True)
    assert judge_prompts(measurements, 0.5, 0.1, 32) <= 2
    assert judge_prompts(measurements, 0.5, 5.0, 100) > 80


@pytest.mark.parametrize("share", [0.02, 0.1, 0.2, 0.5, 0.9])
def test_the_share_of_a_rare_event_is_what_it_is(share: float) -> None:
    noise = random.Random(3)
    measurements = Measurements()
    seen = []
    for _ in range(3000):
        measurements.token_chosen(0.9, is_emitted=noise.random() >= share)
        seen.append(measurements.snapshot().below_threshold)
    assert sum(seen) / len(seen) == pytest.approx(share, abs=0.02)


def test_acceptance_counts_the_drafts_that_were_judged() -> None:
    measurements = Measurements()
    for is_accepted in (True, True, True, True, True, False):
        measurements.draft_judged(is_accepted=is_accepted)
    snapshot = measurements.snapshot()
    assert snapshot.num_judged == 6
    assert snapshot.acceptance == pytest.approx(5 / 6)


def test_a_long_round_trip_counts_fully_after_a_loss() -> None:
    after_loss = Measurements()
    without = Measurements()
    for measurements in (after_loss, without):
        for _ in range(50):
            measurements.round_trip_done(0.02)
    after_loss.session_lost()
    for measurements in (after_loss, without):
        measurements.round_trip_done(1.0)
    assert without.snapshot().round_trip_s == pytest.approx(0.02 + 0.1 * 0.06)
    assert after_loss.snapshot().round_trip_s == pytest.approx(0.02 + 0.1 * 0.98)


def test_losses_are_forgotten_with_the_next_answer() -> None:
    measurements = Measurements()
    measurements.session_lost()
    measurements.session_lost()
    assert measurements.snapshot().num_losses == 2
    measurements.round_trip_done(0.1)
    assert measurements.snapshot().num_losses == 0


def test_what_was_reported_is_in_the_snapshot() -> None:
    measurements = Measurements()
    measurements.step_done(0.02)
    measurements.round_trip_done(0.1)
    measurements.token_chosen(0.9, is_emitted=True)
    measurements.token_chosen(0.5, is_emitted=False)
    for _ in range(4):
        measurements.draft_judged(is_accepted=True)
    measurements.session_lost()
    snapshot = measurements.snapshot()
    assert (snapshot.step_s, snapshot.round_trip_s) == (0.02, 0.1)
    assert (snapshot.below_threshold, snapshot.emitted_confidence) == (0.5, 0.9)
    assert snapshot.confidence == pytest.approx(0.7)
    assert (snapshot.num_round_trips, snapshot.num_choices, snapshot.num_losses) == (1, 2, 1)
    assert snapshot.acceptance == 1.0
