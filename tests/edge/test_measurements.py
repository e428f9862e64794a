"""Means that follow what changes and forget single outliers."""

from __future__ import annotations

import pytest

from edge_agent.measurements import Mean, Measurements


def test_the_first_values_make_a_plain_mean() -> None:
    mean = Mean()
    for value in (1.0, 2.0, 3.0):
        mean.add(value)
    assert mean.value == pytest.approx(2.0)
    assert mean.count == 3


def test_a_lasting_change_is_followed() -> None:
    mean = Mean()
    for value in [1.0] * 100 + [3.0] * 100:
        mean.add(value)
    assert mean.value == pytest.approx(3.0, rel=0.01)
    assert mean.deviation < 0.1


def test_one_pause_is_not_a_trend() -> None:
    mean = Mean()
    for value in [1.0] * 100 + [1000.0]:
        mean.add(value)
    assert mean.value < 1.4


def test_what_was_reported_is_in_the_snapshot() -> None:
    measurements = Measurements()
    measurements.step(0.02)
    measurements.round_trip(0.1, 0.03)
    measurements.chose(0.9, is_sure=True)
    measurements.chose(0.5, is_sure=False)
    measurements.verified(4)
    measurements.lost()
    snapshot = measurements.snapshot()
    assert (snapshot.step_s, snapshot.round_trip_s, snapshot.busy_s) == (0.02, 0.1, 0.03)
    assert (snapshot.unsure, snapshot.sure_confidence) == (0.5, 0.9)
    assert snapshot.confidence == pytest.approx(0.7)
    assert (snapshot.num_round_trips, snapshot.num_choices, snapshot.num_losses) == (1, 2, 1)
    assert snapshot.tokens_per_round == 4
