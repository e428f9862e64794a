"""Thresholds for all exits of a device together: as little offload as an overall agreement allows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Final

import numpy as np

from fleet.errors import ConfigError
from fleet.exits.records import Bools, Floats, Ints, Records

OFF: Final = 1.0  # a threshold that switches an exit off, see fleet.policy.exit_emits
GRID: Final = {1: 0, 2: 64, 3: 24, 4: 10}  # thresholds that are tried for each exit but the last
SAME: Final = 0.0025  # offload rates that near are equal; then the one with more early exits wins
AGREEMENTS: Final = tuple(round(float(x), 4) for x in (*np.arange(0.80, 0.97, 0.01), *np.arange(0.97, 0.9995, 0.0025)))


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
    """For each agreement, the best thresholds: exact for the last exit, on a grid of quantiles for the others.

    Raises:
        ConfigError: no records, or more exits than can be searched.
    """
    if not len(records):
        raise ConfigError("no positions to choose thresholds from; give prompts that the model answers")
    if len(records.exits) not in GRID:
        raise ConfigError(f"{len(records.exits)} exits: thresholds are searched for up to {max(GRID)}")
    budgets = np.floor((1 - np.array(agreements)) * len(records) + 1e-9)
    found: list[list[tuple[float, float, tuple[float, ...]]]] = [[] for _ in agreements]
    order = np.argsort(-records.confidence[:, -1], kind="stable")
    last = records.confidence[order, -1]
    for early, taken, mistakes in combinations(records):
        rest = ~taken[order]
        bad = mistakes + np.cumsum(rest & ~records.agrees[order, -1])
        emitted = int(taken.sum()) + np.cumsum(rest)
        ends = np.flatnonzero(np.append(np.diff(last) != 0, True) & (last > 0))
        for places, budget in zip(found, budgets, strict=True):
            if mistakes > budget:
                continue
            fitting = ends[: np.searchsorted(bad[ends], budget, side="right")]
            if len(fitting):
                end = fitting[-1]
                places.append((1 - emitted[end] / len(records), -float(taken.mean()), (*early, float(last[end]))))
            else:
                places.append((1 - float(taken.mean()), -float(taken.mean()), (*early, OFF)))
    points = []
    for places in found:
        least = min(offload for offload, _, _ in places)
        _, _, thresholds = min((p for p in places if p[0] <= least + SAME), key=lambda place: place[1:2])
        points.append(measure(records, thresholds))
    return points


def combinations(records: Records) -> Iterator[tuple[tuple[float, ...], Bools, int]]:
    """Thresholds for all exits but the last: with the positions that they take, and how many of those are wrong."""
    size = GRID[len(records.exits)]
    grids = [candidates(records.confidence[:, i], size) for i in range(len(records.exits) - 1)]
    for early in product(*grids):
        source = emitting(records, (*early, OFF))
        taken = source < len(records.exits)
        rows = np.flatnonzero(taken)
        yield early, taken, int((~records.agrees[rows, source[rows]]).sum())


def candidates(confidence: Floats, size: int) -> list[float]:
    """Thresholds worth trying for one exit: off, and quantiles that lie closer together at the top."""
    levels = 1 - np.geomspace(1e-3, 1, size)
    return [OFF, *(float(value) for value in np.unique(np.quantile(confidence, levels)) if value < OFF)]
