"""Prompt lookup: the tokens that followed an earlier occurrence of the last tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

MAX_NGRAM: Final = 4
MIN_NGRAM: Final = 2
CHANCE: Final = 0.5


class PromptLookup:
    """The token ids of one sequence, and for each n-gram the places where it ends: a
    :class:`~edge_agent.generation.proposer.Proposer`.

    It drafts without a model, as in prompt lookup decoding
    (https://github.com/apoorvumang/prompt-lookup-decoding).
    """

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._ends: dict[tuple[int, ...], list[int]] = {}

    def __len__(self) -> int:
        return len(self._ids)

    def extend(self, token_ids: Sequence[int]) -> None:
        """Append tokens to the sequence."""
        for token_id in token_ids:
            self._ids.append(token_id)
            for ngram in self._last_ngrams():
                self._ends.setdefault(ngram, []).append(len(self._ids))

    def truncate(self, num_tokens: int) -> None:
        """Drop every token from `num_tokens` on."""
        while len(self._ids) > num_tokens:
            for ngram in self._last_ngrams():
                self._ends[ngram].pop()
                if not self._ends[ngram]:
                    del self._ends[ngram]
            self._ids.pop()

    def propose(self, max_tokens: int) -> list[int]:
        """Find the most recent earlier occurrence of the last tokens; return at most `max_tokens`
        tokens that followed it.

        The longest n-gram that occurred earlier is used. If none did, the list is empty.
        """
        for ngram in self._last_ngrams():
            ends = self._ends[ngram]
            if len(ends) > 1:
                return self._ids[ends[-2] : ends[-2] + max_tokens]
        return []

    def chance(self, number: int) -> float:
        """Return the same probability for each token."""
        del number
        return CHANCE

    def learn(self, num_proposed: int, num_accepted: int) -> None:
        """Learn nothing: the text alone decides."""

    def _last_ngrams(self) -> list[tuple[int, ...]]:
        """Return the n-grams at the end of the text, longest first."""
        longest = min(MAX_NGRAM, len(self._ids))
        return [tuple(self._ids[-n:]) for n in range(longest, MIN_NGRAM - 1, -1)]
