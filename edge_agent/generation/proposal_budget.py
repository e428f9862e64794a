"""The bound on the time that wrong proposals may cost an answer."""

from __future__ import annotations

from typing import Final

FREE_STEPS: Final = 3.0
MAX_LOSS: Final = 0.02


class ProposalBudget:
    """The balance of an answer's proposals, in single steps.

    Proposals may cost at most `MAX_LOSS` of the steps that they save or replace, in addition to
    `FREE_STEPS`, so that no answer becomes much slower than by single steps.
    """

    def __init__(self) -> None:
        self._num_tokens = 0
        self._balance = 0.0

    @property
    def is_spent(self) -> bool:
        """Whether proposals have cost so much that the next step has to be a single one."""
        return self._balance < -(FREE_STEPS + MAX_LOSS * self._num_tokens)

    def count(self, num_tokens: int, cost: float) -> None:
        """Count a step that gave `num_tokens` tokens in the time of `cost` single steps."""
        self._num_tokens += num_tokens
        self._balance += num_tokens - cost
