"""What an engine counts while it works: plain numbers, written by its thread alone and read by any other."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Final

# Upper bounds in seconds: from a step of a small model to more than a device's patience for one question.
BOUNDS_S: Final = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 3.0, 10.0)


@dataclass
class Durations:
    """How many durations fell below each of `BOUNDS_S`, and their sum in seconds."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS_S) + 1))
    sum_s: float = 0.0

    def add(self, duration_s: float) -> None:
        """Counts one more."""
        self.counts[bisect_left(BOUNDS_S, duration_s)] += 1
        self.sum_s += duration_s

    def cumulative(self) -> list[int]:
        """How many were at most as long as each bound; the last one counts them all."""
        return list(accumulate(self.counts))


@dataclass(kw_only=True)
class WorkerCounters:
    """Counts since the engine was made; they only grow.

    Attributes:
        num_expired: questions that nobody waited for any more.
        refusals: by code.
        queued: from a question's arrival until it was first part of a step.
        answered: by kind of question, from its arrival until its answer.
    """

    num_positions: int = 0
    num_expired: int = 0
    refusals: Counter[str] = field(default_factory=Counter)
    queued: Durations = field(default_factory=Durations)
    answered: dict[str, Durations] = field(
        default_factory=lambda: {"assist": Durations(), "verify": Durations()}
    )
