"""Thresholds for all exits of a device together: the least offload for an overall agreement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from fleet.errors import ConfigError
from fleet.exits.records import Bools, Floats, Ints, Records

OFF: Final = 1.0  # a threshold that switches an exit off, see fleet.exits.exit_policy.exit_emits
GRID: Final = {1: 0, 2: 64, 3: 24, 4: 10}
"""Number of thresholds that are tried for each exit but the last, by number of exits."""
FINE: Final = 2048  # and for the last one
SAME: Final = 0.0025
"""Offload rates closer than this are equal; then the thresholds with more early exits win."""
AGREEMENTS: Final = tuple(
    round(float(x), 4) for x in (*np.arange(0.80, 0.97, 0.01), *np.arange(0.97, 0.9995, 0.0025))
)


@dataclass(frozen=True)
class OperatingPoint:
    """Overall agreement and offload rate of thresholds, one for each exit."""

    agreement: float
    offload_rate: float
    thresholds: tuple[float, ...]


def emitting_exits(records: Records, thresholds: Sequence[float]) -> Ints:
    """Return the index of the exit that emits at each position, int64 [n].

    The number of exits stands for the cloud.
    """
    limits = np.array([2.0 if threshold >= OFF else threshold for threshold in thresholds])
    emits = records.confidence >= limits
    return np.where(emits.any(1), emits.argmax(1), len(records.exits)).astype(np.int64)


def disagreements(records: Records, thresholds: Sequence[float]) -> Bools:
    """Return where an exit emits another token than the full model, bool [n]."""
    source = emitting_exits(records, thresholds)
    agrees = np.column_stack([records.agrees, np.ones(len(records), bool)])
    return ~agrees[np.arange(len(records)), source]


def evaluate_thresholds(records: Records, thresholds: Sequence[float]) -> OperatingPoint:
    """Return agreement and offload rate of `thresholds` on `records`."""
    source = emitting_exits(records, thresholds)
    agreement = 1 - float(disagreements(records, thresholds).mean())
    offload_rate = float((source == len(records.exits)).mean())
    return OperatingPoint(agreement, offload_rate, tuple(thresholds))


def best_thresholds(records: Records, agreement: float) -> OperatingPoint:
    """Return the least offload with at least this overall agreement on `records`.

    Raises:
        ConfigError: there are no records, or more exits than can be searched.
    """
    return frontier(records, (agreement,))[0]


def frontier(records: Records, agreements: Sequence[float] = AGREEMENTS) -> list[OperatingPoint]:
    """Return the best thresholds for each agreement on a grid of quantiles.

    The grid is fine for the last exit.

    Raises:
        ConfigError: there are no records, or more exits than can be searched.
    """
    if not len(records):
        raise ConfigError(
            "no positions to choose thresholds from; give prompts that the model answers"
        )
    num_exits = len(records.exits)
    if num_exits not in GRID:
        raise ConfigError(f"{num_exits} exits: thresholds are searched for up to {max(GRID)}")
    columns = records.confidence.T
    grids = [threshold_grid(confidence, GRID[num_exits]) for confidence in columns[:-1]]
    grids.append(last_threshold_grid(columns[-1]))
    passed, offloaded, mistakes = grid_counts(records, grids)
    points: list[OperatingPoint] = []
    for max_mistakes in np.floor((1 - np.array(agreements)) * len(records) + 1e-9):
        thresholds = search_grid(grids, passed, offloaded, mistakes, max_mistakes)
        points.append(evaluate_thresholds(records, thresholds))
    return points


def grid_counts(records: Records, grids: Sequence[Floats]) -> tuple[Ints, Ints, Ints]:
    """Count positions for every combination of thresholds, by one histogram for each exit.

    Return the positions at which no exit but the last may emit, [grid 0, .., 1]; the positions at
    which no exit emits, and the tokens that are wrong, [grid 0, .., last grid].
    """
    columns = zip(grids, records.confidence.T, strict=True)
    cells = [np.searchsorted(grid[:-1], confidence, side="right") for grid, confidence in columns]
    shape = tuple(len(grid) for grid in grids)
    mistakes: Ints = np.zeros(shape, np.int64)
    passed = offloaded = np.full((1,) * len(shape), len(records), np.int64)
    for i in range(len(grids)):
        size = shape[: i + 1]
        places = np.ravel_multi_index(cells[: i + 1], size)
        open_shape = size + (1,) * (len(shape) - i - 1)
        passed = offloaded
        offloaded = cumulative_counts(places, size).reshape(open_shape)
        wrong_places = places[~records.agrees[:, i]]
        below = cumulative_counts(wrong_places, size).reshape(open_shape)
        mistakes += np.take(below, [-1], axis=i) - below
    return passed, offloaded, mistakes


def cumulative_counts(places: Ints, shape: tuple[int, ...]) -> Ints:
    """Return the number of places at or below each cell, along every axis."""
    counts: Ints = np.bincount(places, minlength=int(np.prod(shape))).reshape(shape)
    for axis in range(len(shape)):
        counts = counts.cumsum(axis)
    return counts


def search_grid(
    grids: Sequence[Floats], passed: Ints, offloaded: Ints, mistakes: Ints, max_mistakes: float
) -> tuple[float, ...]:
    """Return the thresholds with the least offload and at most `max_mistakes` mistakes."""
    # A lower last threshold never makes fewer mistakes.
    last = (mistakes > max_mistakes).sum(-1, keepdims=True)
    fits = last < len(grids[-1])
    last = np.minimum(last, len(grids[-1]) - 1)
    offload = np.where(fits, np.take_along_axis(offloaded, last, -1), np.inf)
    near = offload <= offload.min() + SAME * offloaded.flat[-1]
    best = np.unravel_index(np.where(near, passed, np.inf).argmin(), offload.shape)
    indices = (*best[:-1], last[best])
    return tuple(float(grid[i]) for grid, i in zip(grids, indices, strict=True))


def threshold_grid(confidence: Floats, size: int) -> Floats:
    """Return thresholds to try for one exit in order, and off.

    They are quantiles that lie closer together at the top.
    """
    return with_off(np.quantile(confidence, 1 - np.geomspace(1e-3, 1, size)))


def last_threshold_grid(confidence: Floats) -> Floats:
    """Return thresholds to try for the last exit: every value, or `FINE` quantiles of more."""
    values = np.unique(confidence)
    if len(values) > FINE:
        values = np.quantile(values, np.linspace(0, 1, FINE))
    return with_off(values)


def with_off(values: Floats) -> Floats:
    """Return different thresholds in order, and off."""
    return np.append(np.unique(values[values < OFF]), OFF)
