"""The responses that a request accepts, and its deadline."""

from __future__ import annotations

import pytest

from edge_agent.session.pending_verify import PendingVerify, verify_deadline_ms
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
    "response", [verified(2, None), verified(1, 99), verified(0, 99, num_logprobs=1)]
)
def test_a_response_that_fits_is_accepted(response: Verified) -> None:
    assert PendingVerify(body=VERIFY).accepts(response)


@pytest.mark.parametrize(
    "response",
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
def test_a_response_that_does_not_fit_is_not_accepted(response: Verified) -> None:
    assert not PendingVerify(body=VERIFY).accepts(response)


def test_a_renewed_request_accepts_no_response_to_the_earlier_one() -> None:
    request = PendingVerify(body=VERIFY)
    request.renew(request=4, branch=2)
    assert not request.accepts(verified(2, None))
    assert request.accepts(verified(2, None, request=4))
    assert request.body == Verify(
        session="s1", request=4, branch=2, start=7, draft=(11, 12), deadline_ms=100
    )


def test_the_worker_needs_every_position_but_that_of_the_newest_guess() -> None:
    assert PendingVerify(body=VERIFY).num_positions == 9


def test_a_deadline_grows_with_the_positions_that_the_worker_has_to_run_first() -> None:
    assert verify_deadline_ms(1000, 0) == 1000
    assert verify_deadline_ms(1000, 50) == 1500


def test_no_deadline_is_longer_than_the_wire_allows() -> None:
    assert verify_deadline_ms(1000, 1 << 20) == 600_000
