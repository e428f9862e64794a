"""The interface of anything that guesses the next tokens of a text cheaply."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Proposer(Protocol):
    """A guess at the continuation of one text, from other text than the model's choices.

    Proposals are guesses only: the device runs them as one chunk and keeps those that its own
    exits choose, too.
    """

    def __len__(self) -> int:
        """Return the number of tokens in the text."""

    def extend(self, token_ids: Sequence[int]) -> None:
        """Append tokens to the text."""

    def truncate(self, num_tokens: int) -> None:
        """Drop every token of the text from `num_tokens` on."""

    def propose(self, max_tokens: int) -> list[int]:
        """Return at most `max_tokens` tokens that may follow the text; none if no guess pays."""

    def chance(self, number: int) -> float:
        """Return the probability that token `number` of the newest proposal is right, if all
        tokens before it are.
        """

    def learn(self, num_proposed: int, num_accepted: int) -> None:
        """Count the result of the newest proposal.

        `num_proposed` of its tokens have run; the first `num_accepted` of these were right.
        """
