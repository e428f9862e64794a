"""From logits to answers: which token the worker chooses, and what it says of a draft."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from cloud_broker_worker.worker.session import TokenChoice, VerifyJob
from fleet.protocol.messages import Assist, Sampling, Token, Verified, Verify
from fleet.protocol.sampling import draw


class TokenCandidates(NamedTuple):
    """The best tokens after each of some positions, best first.

    `token_ids` [rows, k] int64, `logprobs` [rows, k] float32 at temperature 1; `is_finite` [rows] bool.
    """

    token_ids: npt.NDArray[np.int64]
    logprobs: npt.NDArray[np.float32]
    is_finite: npt.NDArray[np.bool_]

    def rows(self, start: int, stop: int) -> TokenCandidates:
        """Those after positions [start, stop) of these."""
        return TokenCandidates(
            self.token_ids[start:stop], self.logprobs[start:stop], self.is_finite[start:stop]
        )


def best_candidates(logits: torch.Tensor, num_candidates: int) -> TokenCandidates:
    """Those of logits [rows, vocab], at most `num_candidates` of each row."""
    logits = logits.float()
    normalizer = logits.logsumexp(
        -1, keepdim=True
    )  # NaN or infinite as soon as a logit is NaN or +inf
    best, token_ids = logits.topk(min(num_candidates, logits.shape[-1]))
    is_finite = normalizer[:, 0].isfinite()
    return TokenCandidates(
        token_ids.cpu().numpy(), (best - normalizer).cpu().numpy(), is_finite.cpu().numpy()
    )


def num_candidates(samplings: Sequence[Sampling], top_k: int) -> int:
    """How many of a distribution's best tokens such draws can need: one where all are greedy, else `top_k`."""
    return top_k if any(sampling.temperature for sampling in samplings) else 1


def make_choices(question: VerifyJob, candidates: TokenCandidates, sampling: Sampling) -> None:
    """Chooses the tokens that follow the next positions of a question, until it is decided.

    `candidates` are those after the next positions that are judged; a trusted token takes none.
    """
    rows = zip(candidates.token_ids, candidates.logprobs, strict=True)
    while not question.is_decided:
        if (index := len(question.choices)) in question.trusted:
            question.choices.append(TokenChoice(question.draft[index], 0.0))
        elif row := next(rows, None):
            token_ids, logprobs = row
            chosen = draw(logprobs, token_ids, question.next_choice, sampling)
            question.choices.append(TokenChoice(int(token_ids[chosen]), float(logprobs[chosen])))
        else:
            return


def answer_of(question: VerifyJob, session: str, busy_ms: float) -> Token | Verified:
    """What is said to a question whose choices are made."""
    message = question.message
    choices = question.choices
    if isinstance(message, Assist):
        (choice,) = choices
        return Token(
            session=session,
            request=message.request,
            position=message.position,
            token_id=choice.token_id,
            logprob=choice.logprob,
            busy_ms=busy_ms,
        )
    accepted = question.num_accepted
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


def repeats(message: Assist | Verify, answer: Token | Verified | None) -> bool:
    """Whether `message` is the question that was answered so, asked again."""
    if answer is None or message.request != answer.request:
        return False
    if isinstance(message, Assist):
        return isinstance(answer, Token) and message.position == answer.position
    return isinstance(answer, Verified) and message.start == answer.start
