"""The proposer of an answer: its own text and texts of the past, as much of it as pays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from edge_agent.generation.proposal_stats import ShortMemory
from edge_agent.generation.suffix_index import Guess, SuffixIndex
from edge_agent.generation.suffix_table import SuffixTable

OWN_TEXT: Final = "text"
PAST_TEXTS: Final = "past"
MAX_CHANCE: Final = 0.99


class CombinedProposer:
    """A :class:`~edge_agent.generation.proposer.Proposer` that searches the text itself and
    `table`, and proposes what has the most expected tokens a second.

    `chunk_cost` returns the time of a chunk of n positions, in any unit. With guesses of chances
    p1, p2, ... a chunk is expected to give 1 + p1 + p1 p2 + ... tokens.
    """

    def __init__(self, table: SuffixTable, chunk_cost: Callable[[int], float]) -> None:
        self._text = SuffixIndex()
        self._sources: dict[str, SuffixIndex | SuffixTable] = {
            OWN_TEXT: self._text,
            PAST_TEXTS: table,
        }
        self._stats = table.stats
        self._chunk_cost = chunk_cost
        self._memories = {source: ShortMemory() for source in self._sources}
        self._source = OWN_TEXT
        self._proposed: list[Guess] = []

    def __len__(self) -> int:
        return len(self._text)

    @property
    def memories(self) -> Mapping[str, ShortMemory]:
        """The results in this answer, by source."""
        return self._memories

    def extend(self, token_ids: Sequence[int]) -> None:
        """Append tokens to the text."""
        self._text.extend(token_ids)

    def truncate(self, num_tokens: int) -> None:
        """Drop every token of the text from `num_tokens` on."""
        self._text.truncate(num_tokens)

    def propose(self, max_tokens: int) -> list[int]:
        """Return at most `max_tokens` tokens of the best source; none if no guess pays."""
        tail = self._text.tail()
        best_rate = 1 / self._chunk_cost(1)
        self._proposed = []
        for source, texts in self._sources.items():
            guesses = texts.guess(tail, max_tokens)
            rate, count = self._best_rate(source, guesses)
            if rate > best_rate:
                best_rate = rate
                self._source = source
                self._proposed = guesses[:count]
        return [guess.token_id for guess in self._proposed]

    def chance(self, number: int) -> float:
        """Return the probability that token `number` of the newest proposal is right, if all
        tokens before it are.
        """
        return self._chance(self._source, self._proposed[number])

    def learn(self, num_proposed: int, num_accepted: int) -> None:
        """Count the result of the newest proposal; the guesses after the first wrong one have
        none.
        """
        memory = self._memories[self._source]
        for number, guess in enumerate(self._proposed[: min(num_proposed, num_accepted + 1)]):
            is_right = number < num_accepted
            memory.update(self._stats.chance(self._source, guess), is_right=is_right)
            self._stats.update(self._source, guess, is_right=is_right)
        self._proposed = []

    def _best_rate(self, source: str, guesses: Sequence[Guess]) -> tuple[float, int]:
        """Return the best rate in tokens a unit of time, and the number of guesses that has it."""
        best = (0.0, 0)
        survival = 1.0
        expected = 1.0
        for count, guess in enumerate(guesses, 1):
            survival *= self._chance(source, guess)
            expected += survival
            best = max(best, (expected / self._chunk_cost(count + 1), count))
        return best

    def _chance(self, source: str, guess: Guess) -> float:
        factor = self._memories[source].factor
        return min(MAX_CHANCE, factor * self._stats.chance(source, guess))
