"""The suffix table of an app: its prompts and answers of the past, and their use as proposals."""

from __future__ import annotations

import threading
from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Final

from edge_agent.generation.proposal_stats import ProposalStats
from edge_agent.generation.suffix_index import MAX_MATCH, SEPARATOR, Guess, SuffixIndex

MAX_TOKENS: Final = 16_384
NUM_RECENT: Final = 4  # texts that a new one may continue


class SuffixTable:
    """At most `MAX_TOKENS` tokens of texts, the newest ones; any thread may use it.

    When it is full, it drops its older half. A text that continues a recent one, as each turn of a
    chat does, adds only what is new. `num_added` counts the texts.
    """

    def __init__(self, token_ids: Sequence[int] = ()) -> None:
        self.stats = ProposalStats()
        self.num_added = 0
        self._index = SuffixIndex()
        self._index.extend(token_ids[-MAX_TOKENS:])
        self._recent: deque[array[int]] = deque(maxlen=NUM_RECENT)
        self._lock = threading.Lock()

    @property
    def token_ids(self) -> array[int]:
        """A copy of all token ids, with separators."""
        with self._lock:
            return self._index.token_ids[:]

    def guess(self, tail: Sequence[int], max_tokens: int) -> list[Guess]:
        """Return tokens that may follow `tail`, as :meth:`SuffixIndex.guess` does."""
        with self._lock:
            return self._index.guess(tail, max_tokens)

    def add(self, token_ids: Sequence[int]) -> None:
        """Add the text of a prompt and its answer."""
        text = array("i", token_ids[-MAX_TOKENS // 2 :])
        with self._lock:
            num_known = max((_common(text, recent) for recent in self._recent), default=0)
            self._recent.append(text)
            new_ids = text[max(0, num_known - MAX_MATCH) :]
            self._make_room(len(new_ids) + 1)
            self._index.extend(new_ids)
            self._index.extend([SEPARATOR])
            self.num_added += 1

    def _make_room(self, num_tokens: int) -> None:
        if len(self._index) + num_tokens <= MAX_TOKENS:
            return
        kept = self._index.token_ids[-MAX_TOKENS // 2 :][: MAX_TOKENS - num_tokens]
        self._index = SuffixIndex()
        self._index.extend(kept)


def _common(text: Iterable[int], other: Iterable[int]) -> int:
    """Return the length of the common prefix of two texts."""
    pairs = zip(text, other, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
