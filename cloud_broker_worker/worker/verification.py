"""The choice of the worker's tokens from logits, and its verdict on a draft."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from cloud_broker_worker.worker.session import TokenChoice, VerifyJob
from fleet.protocol.messages import Sampling, Verified, Verify
from fleet.protocol.sampling import draw


class TokenCandidates(NamedTuple):
    """The best tokens after each position of a batch, best first.

    `token_ids` [rows, k] int64; `logprobs` [rows, k] float32 at temperature 1; `is_finite` [rows]
    bool, whether all logits of the row are finite.
    """

    token_ids: npt.NDArray[np.int64]
    logprobs: npt.NDArray[np.float32]
    is_finite: npt.NDArray[np.bool_]

    def rows(self, start: int, stop: int) -> TokenCandidates:
        """Return the candidates of rows [start, stop)."""
        rows = slice(start, stop)
        return TokenCandidates(self.token_ids[rows], self.logprobs[rows], self.is_finite[rows])


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
    )


def num_candidates(samplings: Sequence[Sampling], top_k: int) -> int:
    """Return the number of candidates that a draw may need: 1 if all are greedy, else `top_k`."""
    return top_k if any(sampling.temperature for sampling in samplings) else 1


def choose_tokens(job: VerifyJob, candidates: TokenCandidates, sampling: Sampling) -> None:
    """Choose the tokens after the next positions of a job, until it is decided.

    `candidates` has a row for each of the next positions that are judged. A trusted token has no
    row.
    """
    rows = zip(candidates.token_ids, candidates.logprobs, strict=True)
    while not job.is_decided:
        index = len(job.choices)
        if index in job.trusted:
            job.choices.append(TokenChoice(job.draft[index], 0.0))
        elif row := next(rows, None):
            token_ids, logprobs = row
            chosen = draw(logprobs, token_ids, job.next_choice, sampling)
            job.choices.append(TokenChoice(int(token_ids[chosen]), float(logprobs[chosen])))
        else:
            return


def verified_response(job: VerifyJob, session: str, busy_ms: float) -> Verified:
    """Return the verdict on a job that is decided."""
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
    )


def repeats(message: Verify, response: Verified | None) -> bool:
    """Return whether `message` repeats the request to which the verdict `response` belongs."""
    return (
        response is not None
        and message.request == response.request
        and message.start == response.start
    )
