"""What a device has measured of itself, the link and the cloud."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Final

WEIGHT: Final = 0.1  # of a new value, so that about the last twenty count
OUTLIER: Final = 4.0  # a value counts as at most so many times the mean: one pause is not a trend


@dataclass
class Mean:
    """An exponentially weighted mean with its mean deviation; it begins as a plain one."""

    value: float = 0.0
    deviation: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        """Counts a value that is 0 or more."""
        if self.count >= 1 / WEIGHT and self.value > 0:
            value = min(value, OUTLIER * self.value)
        self.count += 1
        weight = max(WEIGHT, 1 / self.count)
        self.deviation += (abs(value - self.value) - self.deviation) * weight if self.count > 1 else 0.0
        self.value += (value - self.value) * weight


@dataclass(frozen=True)
class Snapshot:
    """Everything at one moment; a time of which nothing was measured is 0.

    Attributes:
        step_s: seconds that the device takes for a token.
        round_trip_s: from a question to its answer, the worker's part included; `round_trip_spread_s` its mean
            deviation; `num_round_trips` on how many this rests.
        busy_s: the worker's part of it, queue and computing.
        unsure: share of the tokens of which no exit was sure.
        confidence: mean probability that the device's own token is the cloud's; `sure_confidence` where an exit was
            sure.
        tokens_per_round: what a verify has confirmed; 0 before the first one.
        num_losses: how often a session was lost.
    """

    step_s: float = 0.0
    round_trip_s: float = 0.0
    round_trip_spread_s: float = 0.0
    num_round_trips: int = 0
    busy_s: float = 0.0
    unsure: float = 0.0
    confidence: float = 0.0
    sure_confidence: float = 0.0
    num_choices: int = 0
    tokens_per_round: float = 0.0
    num_losses: int = 0


@dataclass
class Measurements:
    """Shared by all answers of a device; any thread may report."""

    _step: Mean = field(default_factory=Mean)
    _round_trip: Mean = field(default_factory=Mean)
    _busy: Mean = field(default_factory=Mean)
    _unsure: Mean = field(default_factory=Mean)
    _confidence: Mean = field(default_factory=Mean)
    _sure_confidence: Mean = field(default_factory=Mean)
    _round: Mean = field(default_factory=Mean)
    _num_losses: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def step(self, seconds: float) -> None:
        """The device took so long for one token."""
        with self._lock:
            self._step.add(seconds)

    def round_trip(self, seconds: float, busy_s: float) -> None:
        """A question was answered; `busy_s` of the time it was with the worker."""
        with self._lock:
            self._round_trip.add(seconds)
            self._busy.add(busy_s)

    def chose(self, confidence: float, *, is_sure: bool) -> None:
        """The exits chose a token, and one of them was sure or none."""
        with self._lock:
            self._unsure.add(0.0 if is_sure else 1.0)
            self._confidence.add(confidence)
            if is_sure:
                self._sure_confidence.add(confidence)

    def verified(self, num_tokens: int) -> None:
        """A verify has confirmed so many tokens, a correction included."""
        with self._lock:
            self._round.add(num_tokens)

    def lost(self) -> None:
        """A session was lost."""
        with self._lock:
            self._num_losses += 1

    def snapshot(self) -> Snapshot:
        """All of it, now."""
        with self._lock:
            return Snapshot(
                self._step.value, self._round_trip.value, self._round_trip.deviation, self._round_trip.count,
                self._busy.value, self._unsure.value, self._confidence.value, self._sure_confidence.value,
                self._confidence.count, self._round.value, self._num_losses,
            )  # fmt: skip
