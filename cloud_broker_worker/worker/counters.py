"""Counts of an engine's work: plain numbers, written by its thread alone and read by any other."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Final

# Upper bounds in seconds: from a step of a small model to more than a device waits for one
# response.
BOUNDS_S: Final = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 3.0, 10.0)


@dataclass
class Durations:
    """Number of durations below each of `BOUNDS_S`, and their sum in seconds."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS_S) + 1))
    sum_s: float = 0.0

    def add(self, duration_s: float) -> None:
        """Count one more duration."""
        self.counts[bisect_left(BOUNDS_S, duration_s)] += 1
        self.sum_s += duration_s

    def cumulative(self) -> list[int]:
        """Return the number of durations up to each bound; the last number counts them all."""
        return list(accumulate(self.counts))


@dataclass(kw_only=True)
class WorkerCounters:
    """Counts since the engine was made; they only grow.

    Attributes:
        num_continued: sessions that began with positions of an earlier one.
        num_reused: these positions.
        num_expired: verify jobs whose deadline has passed.
        refusals: refusals by code.
        queued: times from a request's arrival until it was first included in a step.
        answered: times from a request's arrival until its response.
    """

    num_positions: int = 0
    num_continued: int = 0
    num_reused: int = 0
    num_expired: int = 0
    refusals: Counter[str] = field(default_factory=Counter)
    queued: Durations = field(default_factory=Durations)
    answered: Durations = field(default_factory=Durations)
