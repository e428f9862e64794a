"""The chance that a guess is right, measured over the answers of an app and within one answer."""

from __future__ import annotations

import threading
from collections import defaultdict
from typing import Final

from edge_agent.generation.suffix_index import Guess

PRIORS: Final = (0.25, 0.55, 0.75, 0.88, 0.95)  # matches of 1, 2, 4, 8, 16 tokens or more
PRIOR_WEIGHT: Final = 4.0
DECAY: Final = 0.99  # a result of about a hundred guesses ago counts a third
SHORT_WEIGHT: Final = 8.0
SHORT_DECAY: Final = 0.9

Bin = tuple[str, int, int]


class ProposalStats:
    """The long memory: the share of right guesses by source, match and agreement of the places.

    The prior was measured on answers of the default model (ADR 0053). Answers of an app share an
    object, on any thread.
    """

    def __init__(self) -> None:
        self._right: dict[Bin, float] = defaultdict(float)
        self._tried: dict[Bin, float] = defaultdict(float)
        self._lock = threading.Lock()

    def chance(self, source: str, guess: Guess) -> float:
        """Return the probability that a guess is right, if all guesses before it are."""
        key = _bin(source, guess)
        right = self._right.get(key, 0.0) + PRIOR_WEIGHT * _prior(guess)
        return right / (self._tried.get(key, 0.0) + PRIOR_WEIGHT)

    def update(self, source: str, guess: Guess, *, is_right: bool) -> None:
        """Count the result of a guess."""
        key = _bin(source, guess)
        with self._lock:
            self._right[key] = DECAY * self._right[key] + is_right
            self._tried[key] = DECAY * self._tried[key] + 1


class ShortMemory:
    """The results of one source in this answer, against their chances by the long memory."""

    def __init__(self) -> None:
        self.num_tried = 0
        self.num_right = 0
        self._right = 0.0
        self._expected = 0.0

    @property
    def factor(self) -> float:
        """The factor by which this answer is better, or worse, than the long memory expects."""
        return (self._right + SHORT_WEIGHT) / (self._expected + SHORT_WEIGHT)

    def update(self, chance: float, *, is_right: bool) -> None:
        """Count the result of a guess that had this chance."""
        self.num_tried += 1
        self.num_right += is_right
        self._right = SHORT_DECAY * self._right + is_right
        self._expected = SHORT_DECAY * self._expected + chance


def _prior(guess: Guess) -> float:
    return PRIORS[_match_class(guess)] * guess.share


def _bin(source: str, guess: Guess) -> Bin:
    share_class = int(2 * guess.share)  # below a half, below all, all
    return source, _match_class(guess), share_class


def _match_class(guess: Guess) -> int:
    return min(guess.match.bit_length(), len(PRIORS)) - 1
