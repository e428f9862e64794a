"""The counts of an answer, and their sums."""

from __future__ import annotations

from typing import Final

from msgspec import Struct

from fleet.protocol.types import Amount, Source


class AnswerCounts(Struct, frozen=True, kw_only=True):
    """The counts that an app receives with its answer; `sources` are tokens by source."""

    prompt_tokens: Amount
    tokens: Amount
    sources: dict[Source, Amount]
    bytes_up: Amount
    bytes_down: Amount
    drafted: Amount = 0


class GenerationCounts(AnswerCounts, frozen=True, kw_only=True):
    """The counts that a device reports, or their sum over several answers.

    For `judged` tokens an exit was confident and the cloud computed the token, too; `agreed` counts
    those of them for which the cloud chose the same token.
    """

    assists: Amount
    verifies: Amount = 0
    judged: Amount = 0
    agreed: Amount = 0

    def merge(self, other: GenerationCounts) -> GenerationCounts:
        """Return the sum of both counts."""
        sources = dict(self.sources)
        for source, tokens in other.sources.items():
            sources[source] = sources.get(source, 0) + tokens
        sums = {name: getattr(self, name) + getattr(other, name) for name in COUNT_FIELDS}
        return GenerationCounts(sources=sources, **sums)

    def limited(self, max_amount: int) -> GenerationCounts:
        """Return the counts with every amount cut to `max_amount`, without empty sources."""
        sources = {name: min(count, max_amount) for name, count in self.sources.items() if count}
        amounts = {name: min(getattr(self, name), max_amount) for name in COUNT_FIELDS}
        return GenerationCounts(sources=sources, **amounts)


COUNT_FIELDS: Final = tuple(
    name for name in GenerationCounts.__struct_fields__ if name != "sources"
)
"""The fields of `GenerationCounts` that are plain amounts."""

NO_COUNTS: Final = GenerationCounts(sources={}, **dict.fromkeys(COUNT_FIELDS, 0))
"""The counts of no answer."""
