"""The tokens that the constraint of one answer allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from fleet.errors import ConstraintError
from fleet.protocol.constraint import Constraint

MAX_REASON: Final = 300  # characters of an error of llguidance
Bool: TypeAlias = npt.NDArray[np.bool_]


class TokenConstraint:
    """The tokens that one answer may have. When the answer is complete, only the end tokens.

    The matcher follows the text of each call: it goes back where drafts were dropped, and forward
    over new tokens.
    """

    def __init__(
        self,
        matcher: Any,
        renew: Callable[[], Any],
        constraint: Constraint,
        *,
        answer_start: int,
        vocab_size: int,
    ) -> None:
        self._matcher = matcher
        self._renew = renew
        self._constraint = constraint
        self._answer_start = answer_start
        self._vocab_size = vocab_size
        self._consumed: list[int] = []

    def allowed(self, text: Sequence[int]) -> Bool | None:
        """Return which tokens [vocab] may follow `text`: the prompt and the answer so far.

        None means that the text itself breaks the constraint.

        Raises:
            ConstraintError: the constraint is too complex at this point of the answer.
        """
        if not self._follow(text):
            return None
        mask = self._matcher.compute_bitmask()
        if self._has_failed() and self._begin_again(text):
            mask = self._matcher.compute_bitmask()
        self._check()
        packed = np.frombuffer(mask, np.uint8)
        return np.unpackbits(packed, count=self._vocab_size, bitorder="little").view(np.bool_)

    def num_allowed(self, text: Sequence[int], following: Sequence[int]) -> int:
        """Return how many of the tokens `following` may follow `text`, before one is forbidden.

        Raises:
            ConstraintError: the constraint is too complex at this point of the answer.
        """
        if not self._follow(text):
            return 0
        num_allowed = int(self._matcher.validate_tokens(list(following)))
        return 0 if self._has_failed() else num_allowed

    def _follow(self, text: Sequence[int]) -> bool:
        """Move the matcher to the end of `text`; return whether the answer is allowed so far."""
        is_allowed = self._move_to(text)
        return self._begin_again(text) if self._has_failed() else is_allowed

    def _begin_again(self, text: Sequence[int]) -> bool:
        """Follow `text` with a new matcher: the states of the old one are used up."""
        self._matcher = self._renew()
        self._consumed = []
        is_allowed = self._move_to(text)
        self._check()
        return is_allowed

    def _move_to(self, text: Sequence[int]) -> bool:
        answer = list(text[self._answer_start :])
        num_equal = common_length(self._consumed, answer)
        self._matcher.rollback(len(self._consumed) - num_equal)
        num_new = self._matcher.try_consume_tokens(answer[num_equal:])
        self._consumed = answer[: num_equal + num_new]
        return len(self._consumed) == len(answer)

    def _has_failed(self) -> bool:
        return bool(self._matcher.is_error())

    def _check(self) -> None:
        if self._has_failed():
            reason = brief_reason(self._matcher.get_error())
            raise ConstraintError(f"{self._constraint.field} is too complex: {reason}; simplify it")


def brief_reason(error: object) -> str:
    """Return the beginning of an error's text as one line."""
    return " ".join(str(error).split())[:MAX_REASON]


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the number of equal items at the start of two sequences."""
    length = min(len(one), len(other))
    if one[:length] == other[:length]:
        return length
    return next(i for i in range(length) if one[i] != other[i])
