"""The rate at which the cloud accepts drafts, by the confidence of their exit."""

from __future__ import annotations

import threading
from typing import Final

NUM_BINS: Final = 10
NUM_ALL_BINS: Final = 2 * NUM_BINS + 1  # of exits, of prompt lookup, of proposals
PRIOR_WEIGHT: Final = 8.0
DECAY: Final = 0.995  # a result of about two hundred drafts ago counts a third
LOOKUP_PRIOR: Final = 0.5


class AcceptanceRate:
    """The acceptance rate of a device, learned from the verdicts in all its answers.

    Before the first verdict, the probability is the confidence.
    """

    def __init__(self) -> None:
        self._accepted = [0.0] * NUM_ALL_BINS
        self._tried = [0.0] * NUM_ALL_BINS
        self._lock = threading.Lock()

    def probability(self, confidence: float) -> float:
        """Return the probability that the cloud accepts a draft whose exit had this confidence."""
        return self._estimate(_bin(confidence), confidence)

    @property
    def lookup_probability(self) -> float:
        """The probability that the cloud accepts a token from prompt lookup."""
        return self._estimate(NUM_BINS, LOOKUP_PRIOR)

    def update(self, confidence: float | None, *, accepted: bool) -> None:
        """Count the verdict on one draft. `confidence` is None for a token from prompt lookup."""
        self._count(NUM_BINS if confidence is None else _bin(confidence), accepted=accepted)

    def _count(self, index: int, *, accepted: bool) -> None:
        with self._lock:
            self._accepted[index] = DECAY * self._accepted[index] + accepted
            self._tried[index] = DECAY * self._tried[index] + 1

    def proposal_probability(self, chance: float) -> float:
        """Return the probability that the cloud accepts a proposal of this chance at a place where
        an exit chose another token.
        """
        return self._estimate(NUM_BINS + 1 + _bin(chance), chance)

    def update_proposal(self, chance: float, *, accepted: bool) -> None:
        """Count whether the cloud chose a proposal of this chance where an exit did not."""
        self._count(NUM_BINS + 1 + _bin(chance), accepted=accepted)

    def _estimate(self, index: int, prior: float) -> float:
        with self._lock:
            num_accepted = self._accepted[index] + PRIOR_WEIGHT * prior
            num_tried = self._tried[index] + PRIOR_WEIGHT
        return num_accepted / num_tried


def _bin(confidence: float) -> int:
    return min(NUM_BINS - 1, max(0, int(confidence * NUM_BINS)))
