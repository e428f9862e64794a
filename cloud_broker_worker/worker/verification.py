"""The choice of the worker's tokens from logits, and its verdict on a draft."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from msgspec import UNSET

from cloud_broker_worker.worker.session import TokenChoice, VerifyJob
from fleet.constraints.token_constraint import TokenConstraint
from fleet.protocol.choice_rules import Float32, Int64, RankedTokens, rank_tokens, top_tokens
from fleet.protocol.messages import Open, Verified, Verify
from fleet.protocol.sampling import draw


class TokenCandidates(NamedTuple):
    """The best tokens after each position of a batch, best first.

    `token_ids` [rows, k] int64; `logprobs` [rows, k] float32 at temperature 1; `is_finite` [rows]
    bool, whether all logits of the row are finite; `logits` [rows, vocab] float32 of all tokens.
    """

    token_ids: npt.NDArray[np.int64]
    logprobs: npt.NDArray[np.float32]
    is_finite: npt.NDArray[np.bool_]
    logits: torch.Tensor

    def rows(self, start: int, stop: int) -> TokenCandidates:
        """Return the candidates of rows [start, stop)."""
        rows = slice(start, stop)
        return TokenCandidates(
            self.token_ids[rows], self.logprobs[rows], self.is_finite[rows], self.logits[rows]
        )

    def choose(
        self,
        row: int,
        position: int,
        opening: Open,
        text: Sequence[int],
        constraint: TokenConstraint | None = None,
    ) -> TokenChoice:
        """Return the choice of a row, the one after `position`, where the tokens `text` end."""
        rules = opening.choice_rules
        ids = self.token_ids[row]
        logprobs = self.logprobs[row]
        ranked = RankedTokens(ids, logprobs, logprobs, 1.0)
        if rules.change_logits:
            allowed = constraint.allowed(text) if constraint else None
            logits_of = partial(self._logits_of, row)
            ranked = rank_tokens(ids, logprobs, rules, text, logits_of, allowed)
        chosen = draw(ranked.scores, ranked.token_ids, position, opening.sampling, rules.min_p)
        return TokenChoice(
            int(ranked.token_ids[chosen]),
            float(ranked.logprobs[chosen]),
            top_tokens(ids, logprobs, rules.top_logprobs),
        )

    def _logits_of(self, row: int, token_ids: Int64 | None) -> Float32:
        """Return the logits [n] of tokens [n] in a row, or of all for None."""
        logits = self.logits[row]
        return (logits if token_ids is None else logits[torch.from_numpy(token_ids)]).cpu().numpy()


def best_candidates(logits: torch.Tensor, num_candidates: int) -> TokenCandidates:
    """Return the best tokens of logits [rows, vocab], at most `num_candidates` of each row."""
    logits = logits.float()
    # The sum is NaN or infinite as soon as a logit is NaN or +inf.
    normalizer = logits.logsumexp(-1, keepdim=True)
    best, token_ids = logits.topk(min(num_candidates, logits.shape[-1]))
    return TokenCandidates(
        token_ids.cpu().numpy(),
        (best - normalizer).cpu().numpy(),
        normalizer[:, 0].isfinite().cpu().numpy(),
        logits,
    )


def num_candidates(openings: Iterable[Open], top_k: int) -> int:
    """Return the number of candidates that a choice may need: 1 if all are greedy and without
    rules, else `top_k`.
    """
    needs_more = any(each.sampling.temperature or each.rules for each in openings)
    return top_k if needs_more else 1


def choose_tokens(
    job: VerifyJob,
    candidates: TokenCandidates,
    opening: Open,
    text: Sequence[int] = (),
    constraint: TokenConstraint | None = None,
) -> None:
    """Choose the tokens after the next positions of a job, until it is decided.

    `candidates` has a row for each of the next positions that are judged. A trusted token has no
    row. `text` has the tokens at all positions if the session's rules need them.

    Raises:
        ConstraintError: the constraint is too complex.
    """
    rows = iter(range(len(candidates.token_ids)))
    while not job.is_decided:
        index = len(job.choices)
        if index in job.trusted:
            job.choices.append(TokenChoice(job.draft[index], 0.0))
        elif (row := next(rows, None)) is not None:
            position = job.next_choice
            choice = candidates.choose(row, position, opening, text[: position + 1], constraint)
            job.choices.append(choice)
        else:
            return


def verified_response(
    job: VerifyJob, session: str, busy_ms: float, *, has_top: bool = False
) -> Verified:
    """Return the verdict on a job that is decided, and with `has_top` the best tokens."""
    message = job.message
    choices = job.choices
    accepted = job.num_accepted
    own = None if accepted == len(message.draft) else choices[accepted].token_id
    logprobs = tuple(choice.logprob for choice in choices[: accepted + 1])
    return Verified(
        session=session,
        request=message.request,
        start=message.start,
        accepted=accepted,
        token_id=own,
        logprobs=logprobs,
        busy_ms=busy_ms,
        top=tuple(choice.top for choice in choices[: accepted + 1]) if has_top else UNSET,
    )


def repeats(message: Verify, response: Verified | None) -> bool:
    """Return whether `message` repeats the request to which the verdict `response` belongs."""
    return (
        response is not None
        and message.request == response.request
        and message.start == response.start
    )
