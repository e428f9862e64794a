"""Thresholds for all exits of a device together: as little offload as an overall agreement allows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from fleet.errors import ConfigError
from fleet.exits.records import Bools, Floats, Ints, Records

OFF: Final = 1.0  # a threshold that switches an exit off, see fleet.protocol.modes.exit_emits
GRID: Final = {1: 0, 2: 64, 3: 24, 4: 10}  # thresholds that are tried for each exit but the last
FINE: Final = 2048  # and for the last one
SAME: Final = 0.0025  # offload rates that near are equal; then the one with more early exits wins
AGREEMENTS: Final = tuple(
    round(float(x), 4) for x in (*np.arange(0.80, 0.97, 0.01), *np.arange(0.97, 0.9995, 0.0025))
)


@dataclass(frozen=True)
class Point:
    """What thresholds, one for each exit, give: overall agreement and offload rate."""

    agreement: float
    offload_rate: float
    thresholds: tuple[float, ...]


def emitting(records: Records, thresholds: Sequence[float]) -> Ints:
    """Index of the exit that emits at each position, or the number of exits for the cloud, int64 [n]."""
    limits = np.array([2.0 if threshold >= OFF else threshold for threshold in thresholds])
    emits = records.confidence >= limits
    return np.where(emits.any(1), emits.argmax(1), len(records.exits)).astype(np.int64)


def wrong(records: Records, thresholds: Sequence[float]) -> Bools:
    """Where an exit emits another token than the full model, bool [n]."""
    source = emitting(records, thresholds)
    agrees = np.column_stack([records.agrees, np.ones(len(records), bool)])
    return ~agrees[np.arange(len(records)), source]


def measure(records: Records, thresholds: Sequence[float]) -> Point:
    """What `thresholds` give on `records`."""
    source = emitting(records, thresholds)
    agreement = 1 - float(wrong(records, thresholds).mean())
    return Point(agreement, float((source == len(records.exits)).mean()), tuple(thresholds))


def best_thresholds(records: Records, agreement: float) -> Point:
    """The least offload with at least this overall agreement on `records`.

    Raises:
        ConfigError: no records, or more exits than can be searched.
    """
    return frontier(records, (agreement,))[0]


def frontier(records: Records, agreements: Sequence[float] = AGREEMENTS) -> list[Point]:
    """For each agreement, the best thresholds on a grid of quantiles, which is fine for the last exit.

    Raises:
        ConfigError: no records, or more exits than can be searched.
    """
    if not len(records):
        raise ConfigError(
            "no positions to choose thresholds from; give prompts that the model answers"
        )
    if len(records.exits) not in GRID:
        raise ConfigError(
            f"{len(records.exits)} exits: thresholds are searched for up to {max(GRID)}"
        )
    grids = [
        candidates(confidence, GRID[len(records.exits)]) for confidence in records.confidence.T[:-1]
    ]
    grids.append(last_candidates(records.confidence[:, -1]))
    passed, rest, mistakes = outcomes(records, grids)
    budgets = np.floor((1 - np.array(agreements)) * len(records) + 1e-9)
    return [measure(records, choose(grids, passed, rest, mistakes, budget)) for budget in budgets]


def outcomes(records: Records, grids: Sequence[Floats]) -> tuple[Ints, Ints, Ints]:
    """Counts for every combination of thresholds, from one histogram of the positions for each exit.

    Gives: positions that no exit but the last may emit, [grid 0, .., 1]; positions that no exit emits and tokens that
    are wrong, [grid 0, .., last grid].
    """
    columns = zip(grids, records.confidence.T, strict=True)
    cells = [np.searchsorted(grid[:-1], confidence, side="right") for grid, confidence in columns]
    shape = tuple(len(grid) for grid in grids)
    mistakes: Ints = np.zeros(shape, np.int64)
    passed = rest = np.full((1,) * len(shape), len(records), np.int64)
    for i in range(len(grids)):
        places = np.ravel_multi_index(cells[: i + 1], shape[: i + 1])
        size = shape[: i + 1]
        open_shape = shape[: i + 1] + (1,) * (len(shape) - i - 1)
        passed = rest
        rest = counted(places, size).reshape(open_shape)
        below = counted(places[~records.agrees[:, i]], size).reshape(open_shape)
        mistakes += np.take(below, [-1], axis=i) - below
    return passed, rest, mistakes


def counted(places: Ints, shape: tuple[int, ...]) -> Ints:
    """How many places are at or below each cell, along every axis."""
    counts: Ints = np.bincount(places, minlength=int(np.prod(shape))).reshape(shape)
    for axis in range(len(shape)):
        counts = counts.cumsum(axis)
    return counts


def choose(
    grids: Sequence[Floats], passed: Ints, rest: Ints, mistakes: Ints, budget: float
) -> tuple[float, ...]:
    """The thresholds with the least offload among those with at most `budget` mistakes."""
    last = (mistakes > budget).sum(
        -1, keepdims=True
    )  # a lower last threshold never makes fewer mistakes
    fits = last < len(grids[-1])
    last = np.minimum(last, len(grids[-1]) - 1)
    offload = np.where(fits, np.take_along_axis(rest, last, -1), np.inf)
    near = offload <= offload.min() + SAME * rest.flat[-1]
    best = np.unravel_index(np.where(near, passed, np.inf).argmin(), offload.shape)
    return tuple(float(grid[i]) for grid, i in zip(grids, (*best[:-1], last[best]), strict=True))


def candidates(confidence: Floats, size: int) -> Floats:
    """Thresholds worth trying for one exit, in order: quantiles that lie closer together at the top, and off."""
    return with_off(np.quantile(confidence, 1 - np.geomspace(1e-3, 1, size)))


def last_candidates(confidence: Floats) -> Floats:
    """The same for the last exit: every value, or `FINE` quantiles when there are more."""
    values = np.unique(confidence)
    return with_off(values if len(values) <= FINE else np.quantile(values, np.linspace(0, 1, FINE)))


def with_off(values: Floats) -> Floats:
    """Different thresholds in order, and off."""
    return np.append(np.unique(values[values < OFF]), OFF)
