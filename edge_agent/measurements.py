"""The measurements of a device about itself, its link and the cloud."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Final

FURTHER_COST: Final = 0.25
"""The time of one more position in a run, in those of a single one, before it is measured."""
MIN_FURTHER_S: Final = 1e-4
"""The least time of one more position in a run, in seconds."""
MIN_PROMPT: Final = 64
"""The positions of a prompt from which on its upload is worth a choice."""
NUM_TRIALS: Final = 3
"""The prompts that are uploaded in each way before the measured times decide."""
TRIAL_INTERVAL: Final = 16
"""Of so many prompts one is uploaded in the way that was slower, which may have become faster."""
MAX_IDS_TIME: Final = 0.8
"""Token ids are uploaded if they take at most this part of the time of hidden states."""
OUTLIER: Final = 4.0  # limit of a duration, in means: one pause is not a trend


@dataclass
class Mean:
    """An exponentially weighted mean with its mean deviation; it begins as a plain mean.

    `weight` is that of a new value: about the last 2 / weight values count.
    """

    weight: float
    value: float = 0.0
    deviation: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        """Count a value that is 0 or more."""
        self.count += 1
        weight = max(self.weight, 1 / self.count)
        if self.count > 1:
            self.deviation += (abs(value - self.value) - self.deviation) * weight
        self.value += (value - self.value) * weight


class Duration(Mean):
    """The mean of durations, which a single outlier does not move far.

    A share must not be limited like this: of a rare event every occurrence is an outlier.
    """

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
    """All measurements at one moment; a time that was not measured is 0.

    Attributes:
        step_s: seconds that the device takes for a token.
        round_trip_s: seconds from a verify request to its response, the worker's time included;
            `round_trip_spread_s` is the mean deviation and `num_round_trips` the number of values.
        below_threshold: share of the tokens that no exit emits.
        confidence: mean probability that the device's own token is the cloud's;
            `emitted_confidence` is that of the tokens that an exit emits.
        guess_acceptance: share of the judged drafts below the threshold that the cloud accepted.
        acceptance: share of all judged drafts that the cloud accepted; `num_judged` is their
            number.
        num_losses: number of lost sessions since the last response.
    """

    step_s: float = 0.0
    round_trip_s: float = 0.0
    round_trip_spread_s: float = 0.0
    num_round_trips: int = 0
    below_threshold: float = 0.0
    confidence: float = 0.0
    emitted_confidence: float = 0.0
    num_choices: int = 0
    guess_acceptance: float = 0.0
    acceptance: float = 0.0
    num_judged: int = 0
    num_losses: int = 0


@dataclass(kw_only=True)
class Measurements:
    """The measurements of all answers of a device; any thread may report."""

    _step: Duration = field(default_factory=_duration)
    _single: Duration = field(default_factory=_duration)
    _further: Duration = field(default_factory=_duration)
    _round_trip: Duration = field(default_factory=_duration)
    _below_threshold: Mean = field(default_factory=_share)
    _confidence: Mean = field(default_factory=_share)
    _emitted_confidence: Mean = field(default_factory=_share)
    _guess_acceptance: Mean = field(default_factory=_share)
    _acceptance: Mean = field(default_factory=_share)
    _ids_wait: Duration = field(default_factory=_duration)
    _hidden_wait: Duration = field(default_factory=_duration)
    _num_losses: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def step_done(self, seconds: float) -> None:
        """Count the time of a token: that of a step by the number of its tokens."""
        with self._lock:
            self._step.add(seconds)

    def chunk_done(self, num_positions: int, seconds: float) -> None:
        """Count a run of the device over some positions."""
        with self._lock:
            if num_positions == 1:
                self._single.add(seconds)
            elif self._single.count:
                further_s = (seconds - self._single.value) / (num_positions - 1)
                self._further.add(max(0.0, further_s))

    def chunk_cost(self, num_positions: int) -> float:
        """Return the time of a run over some positions, in seconds if it was measured."""
        with self._lock:
            single = self._single.value or 1.0
            further = self._further.value if self._further.count else FURTHER_COST * single
            return single + (num_positions - 1) * further

    def positions_within(self, seconds: float) -> int:
        """Return how many positions, at least one, a run of at most this time has."""
        single = self.chunk_cost(1)
        further = self.chunk_cost(2) - single
        return 1 + int(max(0.0, seconds - single) / max(further, MIN_FURTHER_S))

    def round_trip_done(self, seconds: float) -> None:
        """Count a round trip from a verify request to its response, the worker's time included.

        After a loss a long time is no outlier: the link has become slow.
        """
        with self._lock:
            self._round_trip.add(seconds, is_outlier_possible=not self._num_losses)
            self._num_losses = 0

    def prompt_judged(self, num_positions: int, seconds: float, *, has_ids: bool) -> None:
        """Count the wait for the first verdict after a prompt, which was uploaded as token ids or
        as hidden states.
        """
        if num_positions >= MIN_PROMPT:
            with self._lock:
                wait = self._ids_wait if has_ids else self._hidden_wait
                wait.add(seconds / num_positions)

    def is_faster_as_ids(self) -> bool:
        """Return whether to upload the next prompt as token ids, by the times of earlier ones."""
        with self._lock:
            num_ids = self._ids_wait.count
            num_hidden = self._hidden_wait.count
            if min(num_ids, num_hidden) < NUM_TRIALS:
                return num_ids < num_hidden
            is_faster = self._ids_wait.value <= MAX_IDS_TIME * self._hidden_wait.value
            is_trial = (num_ids + num_hidden) % TRIAL_INTERVAL == 0
            return is_faster != is_trial

    def token_chosen(self, confidence: float, *, is_emitted: bool) -> None:
        """Count a chosen token; `is_emitted` when its confidence reached a threshold."""
        with self._lock:
            self._below_threshold.add(0.0 if is_emitted else 1.0)
            self._confidence.add(confidence)
            if is_emitted:
                self._emitted_confidence.add(confidence)

    def guess_judged(self, *, is_accepted: bool) -> None:
        """Count the cloud's verdict on a draft below the threshold."""
        with self._lock:
            self._guess_acceptance.add(float(is_accepted))

    def draft_judged(self, *, is_accepted: bool) -> None:
        """Count the cloud's verdict on a draft."""
        with self._lock:
            self._acceptance.add(float(is_accepted))

    def session_lost(self) -> None:
        """Count a lost session."""
        with self._lock:
            self._num_losses += 1

    def snapshot(self) -> Snapshot:
        """Return all measurements."""
        with self._lock:
            return Snapshot(
                step_s=self._step.value,
                round_trip_s=self._round_trip.value,
                round_trip_spread_s=self._round_trip.deviation,
                num_round_trips=self._round_trip.count,
                below_threshold=self._below_threshold.value,
                confidence=self._confidence.value,
                emitted_confidence=self._emitted_confidence.value,
                num_choices=self._confidence.count,
                guess_acceptance=self._guess_acceptance.value,
                acceptance=self._acceptance.value,
                num_judged=self._acceptance.count,
                num_losses=self._num_losses,
            )
