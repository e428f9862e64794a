"""What a device has measured of itself, the link and the cloud."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Final

OUTLIER: Final = (
    4.0  # a duration counts as at most so many times the mean: one pause is not a trend
)


@dataclass
class Mean:
    """An exponentially weighted mean with its mean deviation; it begins as a plain one.

    `weight` is that of a new value: about the last 2 / weight values count.
    """

    weight: float
    value: float = 0.0
    deviation: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        """Counts a value that is 0 or more."""
        self.count += 1
        weight = max(self.weight, 1 / self.count)
        self.deviation += (
            (abs(value - self.value) - self.deviation) * weight if self.count > 1 else 0.0
        )
        self.value += (value - self.value) * weight


class Duration(Mean):
    """The mean of durations, which a single outlier does not move far. A share must not be cut like this: of a rare
    event every occurrence is an outlier."""

    def add(self, value: float, *, is_outlier_possible: bool = True) -> None:
        if is_outlier_possible and self.count >= 1 / self.weight and self.value > 0:
            value = min(value, OUTLIER * self.value)
        super().add(value)


def _duration() -> Duration:
    return Duration(weight=0.1)


def _share() -> Mean:
    return Mean(weight=0.02)


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Everything at one moment; a time of which nothing was measured is 0.

    Attributes:
        step_s: seconds that the device takes for a token.
        round_trip_s: from a question to its answer, the worker's part included; `round_trip_spread_s` its mean
            deviation; `num_round_trips` on how many this rests.
        unsure: share of the tokens of which no exit was sure.
        confidence: mean probability that the device's own token is the cloud's; `sure_confidence` where an exit was
            sure.
        right: share of the judged drafts that no exit was sure of and the cloud accepted.
        acceptance: share of the judged drafts that the cloud accepted; `num_judged` on how many this rests.
        num_losses: how often a session was lost since the last answer.
    """

    step_s: float = 0.0
    round_trip_s: float = 0.0
    round_trip_spread_s: float = 0.0
    num_round_trips: int = 0
    unsure: float = 0.0
    confidence: float = 0.0
    sure_confidence: float = 0.0
    num_choices: int = 0
    right: float = 0.0
    acceptance: float = 0.0
    num_judged: int = 0
    num_losses: int = 0


@dataclass(kw_only=True)
class Measurements:
    """Shared by all answers of a device; any thread may report."""

    _step: Duration = field(default_factory=_duration)
    _round_trip: Duration = field(default_factory=_duration)
    _unsure: Mean = field(default_factory=_share)
    _confidence: Mean = field(default_factory=_share)
    _sure_confidence: Mean = field(default_factory=_share)
    _right: Mean = field(default_factory=_share)
    _acceptance: Mean = field(default_factory=_share)
    _num_losses: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def step(self, seconds: float) -> None:
        """The device took so long for one token."""
        with self._lock:
            self._step.add(seconds)

    def round_trip(self, seconds: float) -> None:
        """A question was answered, the worker's time included.

        After a loss a long time is no outlier: the link has become slow.
        """
        with self._lock:
            self._round_trip.add(seconds, is_outlier_possible=not self._num_losses)
            self._num_losses = 0

    def chose(self, confidence: float, *, is_sure: bool) -> None:
        """The exits chose a token, and one of them was sure or none."""
        with self._lock:
            self._unsure.add(0.0 if is_sure else 1.0)
            self._confidence.add(confidence)
            if is_sure:
                self._sure_confidence.add(confidence)

    def guessed(self, *, is_right: bool) -> None:
        """The cloud has judged a draft that no exit was sure of."""
        with self._lock:
            self._right.add(float(is_right))

    def judged(self, *, is_accepted: bool) -> None:
        """The cloud has judged a draft."""
        with self._lock:
            self._acceptance.add(float(is_accepted))

    def lost(self) -> None:
        """A session was lost."""
        with self._lock:
            self._num_losses += 1

    def snapshot(self) -> Snapshot:
        """All of it, now."""
        with self._lock:
            return Snapshot(
                step_s=self._step.value,
                round_trip_s=self._round_trip.value,
                round_trip_spread_s=self._round_trip.deviation,
                num_round_trips=self._round_trip.count,
                unsure=self._unsure.value,
                confidence=self._confidence.value,
                sure_confidence=self._sure_confidence.value,
                num_choices=self._confidence.count,
                right=self._right.value,
                acceptance=self._acceptance.value,
                num_judged=self._acceptance.count,
                num_losses=self._num_losses,
            )
