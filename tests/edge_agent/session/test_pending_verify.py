"""Which answers a question takes."""

from __future__ import annotations

import pytest

from edge_agent.session.pending_verify import PendingVerify
from fleet.protocol.messages import Verified, Verify

VERIFY = Verify(session="s1", request=3, branch=0, start=7, draft=(11, 12), deadline_ms=100)


def verified(
    accepted: int, token_id: int | None, *, request: int = 3, start: int = 7, num_logprobs: int = 2
) -> Verified:
    return Verified(
        session="s1",
        request=request,
        start=start,
        accepted=accepted,
        token_id=token_id,
        logprobs=(-1.0,) * num_logprobs,
    )


@pytest.mark.parametrize(
    "answer", [verified(2, None), verified(1, 99), verified(0, 99, num_logprobs=1)]
)
def test_an_answer_that_fits_is_taken(answer: Verified) -> None:
    assert PendingVerify(body=VERIFY).is_answered_by(answer)


@pytest.mark.parametrize(
    "answer",
    [
        verified(2, None, request=2),
        verified(2, None, start=8),
        verified(2, 99, num_logprobs=3),
        verified(1, None, num_logprobs=1),
        verified(3, None, num_logprobs=3),
        verified(1, 99, num_logprobs=1),
    ],
    ids=str,
)
def test_an_answer_that_does_not_fit_is_none(answer: Verified) -> None:
    assert not PendingVerify(body=VERIFY).is_answered_by(answer)


def test_a_renewed_question_takes_no_answer_to_the_earlier_one() -> None:
    question = PendingVerify(body=VERIFY)
    question.renew(request=4, branch=2)
    assert not question.is_answered_by(verified(2, None))
    assert question.is_answered_by(verified(2, None, request=4))
    assert question.body == Verify(
        session="s1", request=4, branch=2, start=7, draft=(11, 12), deadline_ms=100
    )


def test_the_worker_needs_every_position_but_that_of_the_newest_guess() -> None:
    assert PendingVerify(body=VERIFY).num_positions == 9
