"""Thresholds for all exits together give the least offload that an agreement allows."""

from __future__ import annotations

from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest

from fleet.errors import ConfigError
from fleet.exits.profile import pareto_front, profile_exits
from fleet.exits.records import Recording, Records, load_recording, save_recording
from fleet.exits.thresholds import (
    OFF,
    OperatingPoint,
    best_thresholds,
    emitting_exits,
    evaluate_thresholds,
    frontier,
)


def make_records(
    num_answers: int, length: int, exits: tuple[int, ...] = (8, 15), seed: int = 0
) -> Records:
    """Return positions whose exits are as right as confident, deeper ones more often both."""
    random = np.random.default_rng(seed)
    n = num_answers * length
    confidence = np.column_stack([random.beta(1 + i, 2, n) for i in range(len(exits))])
    agrees = random.random(confidence.shape) < confidence**0.5
    return Records(exits, np.repeat(np.arange(num_answers), length), confidence, agrees)


@pytest.fixture(scope="module")
def everything() -> tuple[Records, list[OperatingPoint]]:
    """Positions, and every pair of thresholds that can make a difference to them."""
    records = make_records(20, 10)
    values = [np.append(np.unique(records.confidence[:, i]), OFF) for i in range(2)]
    return records, [evaluate_thresholds(records, pair) for pair in product(*values)]


def test_the_first_confident_exit_emits_and_one_that_is_off_never_does() -> None:
    records = Records(
        (8, 15),
        np.zeros(4, int),
        np.array([[0.9, 0.1], [0.1, 0.9], [0.1, 0.1], [1, 1]]),
        np.ones((4, 2), bool),
    )
    assert emitting_exits(records, (0.5, 0.5)).tolist() == [0, 1, 2, 0]
    assert emitting_exits(records, (OFF, 0.5)).tolist() == [2, 1, 2, 1]
    assert emitting_exits(records, (OFF, OFF)).tolist() == [2, 2, 2, 2]
    assert evaluate_thresholds(records, (0.5, 0.5)) == OperatingPoint(1.0, 0.25, (0.5, 0.5))


@pytest.mark.parametrize("target", [0.98, 0.9, 0.8])
def test_the_search_is_as_good_as_trying_everything(
    target: float, everything: tuple[Records, list[OperatingPoint]]
) -> None:
    records, points = everything
    least = min(point.offload_rate for point in points if point.agreement >= target)
    found = best_thresholds(records, target)
    assert found.agreement >= target
    assert found.offload_rate <= least + 0.02  # the first exit is searched on a grid


def test_one_exit_is_searched_exactly() -> None:
    records = make_records(20, 20, (15,))
    for target in (0.99, 0.95, 0.85):
        everything = [
            evaluate_thresholds(records, (value,)) for value in (*records.confidence[:, 0], OFF)
        ]
        least = min(point.offload_rate for point in everything if point.agreement >= target)
        assert best_thresholds(records, target).offload_rate == pytest.approx(least)


@pytest.mark.parametrize("exits", [(4,), (4, 8), (4, 8, 12), (2, 4, 8, 12)])
def test_the_frontier_only_offloads_more_for_more_agreement(exits: tuple[int, ...]) -> None:
    points = frontier(make_records(40, 20, exits))
    assert all(len(point.thresholds) == len(exits) for point in points)
    offload = [point.offload_rate for point in points]
    assert all(before <= after + 0.005 for before, after in pairwise(offload))


def test_equal_confidences_stay_together() -> None:
    confidence = np.full((10, 1), 0.7)
    agrees = np.array([[True]] * 9 + [[False]])
    records = Records((3,), np.zeros(10, int), confidence, agrees)
    assert best_thresholds(records, 0.95) == OperatingPoint(1.0, 1.0, (OFF,))
    assert best_thresholds(records, 0.90).offload_rate == 0.0


def test_choices_of_exits_count_lm_heads_and_all_layers_up_to_the_split() -> None:
    choices = {
        choice.exits: choice
        for choice in profile_exits(make_records(40, 20, (8, 15, 20)), 30, 8.0, 0.9)
    }
    assert choices[(20,)].edge_cost == pytest.approx(28 / 38)
    assert 28 / 38 < choices[(8, 20)].edge_cost <= 36 / 38
    kept = pareto_front(list(choices.values()))
    assert [choice.edge_cost for choice in kept] == sorted(choice.edge_cost for choice in kept)
    assert choices[(20,)] in kept or any(
        choice.offload_rate <= choices[(20,)].offload_rate for choice in kept
    )


def test_records_survive_a_file_and_garbage_does_not(tmp_path: Path) -> None:
    recording = Recording(
        records=make_records(3, 4),
        parts_sha256="ab" * 32,
        prompts_sha256=("cd" * 32, "ef" * 32),
        num_prompts=3,
        max_new_tokens=64,
    )
    path = tmp_path / "records.npz"
    save_recording(recording, path)
    again = load_recording(path)
    assert (
        again.records.exits,
        again.parts_sha256,
        again.prompts_sha256,
        again.num_prompts,
        again.max_new_tokens,
    ) == (
        recording.records.exits,
        recording.parts_sha256,
        recording.prompts_sha256,
        3,
        64,
    )
    for name in ("answer", "confidence", "agrees"):
        np.testing.assert_array_equal(
            getattr(again.records, name), getattr(recording.records, name)
        )
    whole = path.read_bytes()
    for garbage in (b"", b"no records", whole[: len(whole) // 2]):
        path.write_bytes(garbage)
        with pytest.raises(ConfigError, match="cannot read the records"):
            load_recording(path)
    with pytest.raises(ConfigError, match="cannot write the records"):
        save_recording(recording, tmp_path / "none" / "records.npz")


def test_many_positions_lose_next_to_nothing_to_the_grid() -> None:
    records = make_records(200, 50)
    finer = np.append(
        np.quantile(records.confidence, np.linspace(0, 1, 60), axis=0), [[OFF, OFF]], axis=0
    )
    grid = [evaluate_thresholds(records, (first, last)) for first, last in product(*finer.T)]
    for target in (0.98, 0.9):
        found = best_thresholds(records, target)
        assert found.agreement >= target
        assert (
            found.offload_rate <= min(p.offload_rate for p in grid if p.agreement >= target) + 0.005
        )


def test_invalid_records_are_refused() -> None:
    with pytest.raises(ConfigError, match="no positions"):
        frontier(Records((8,), np.zeros(0, int), np.zeros((0, 1)), np.zeros((0, 1), bool)))
    with pytest.raises(ConfigError, match="confidence that is not from 0 to 1"):
        Records((8,), np.zeros(1, int), np.array([[np.nan]]), np.ones((1, 1), bool))
    with pytest.raises(ConfigError, match="searched for up to 4"):
        frontier(make_records(2, 2, (1, 2, 3, 4, 5)))
