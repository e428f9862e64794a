"""The verify request that a session has sent or is about to send; there is at most one at a
time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import msgspec

from fleet.protocol.messages import Verified, Verify

MS_PER_POSITION: Final = 10  # allowed to a worker for each position that it has to run first
MAX_DEADLINE_MS: Final = 600_000


def verify_deadline_ms(base_ms: int, num_pending: int) -> int:
    """Return the deadline of a verify request when the worker has `num_pending` positions to run
    first.
    """
    return min(base_ms + MS_PER_POSITION * num_pending, MAX_DEADLINE_MS)


@dataclass(kw_only=True)
class PendingVerify:
    """A verify request and how often it has been sent.

    The worker has `body.deadline_ms` milliseconds from `first_sent_at` on. At `abandon_at` the
    device goes on without a response; a request with such a time does not wait for another worker
    either. All times are seconds of one clock.
    """

    body: Verify
    abandon_at: float = math.inf
    response: Verified | None = None
    first_sent_at: float = 0.0
    resend_at: float = 0.0
    num_sent: int = 0
    is_handed_over: bool = False  # to the network

    @property
    def deadline_s(self) -> float:
        return self.body.deadline_ms / 1000

    @property
    def num_positions(self) -> int:
        """The worker needs positions [0, n) to respond."""
        return self.body.start + len(self.body.draft)

    def accepts(self, response: Verified) -> bool:
        """Return whether `response` has this request's number and is a possible response to it."""
        num_own = 0 if response.token_id is None else 1
        return (
            self.body.request == response.request
            and self.body.start == response.start
            and response.accepted + num_own == min(len(self.body.draft), response.accepted + 1)
            and len(response.logprobs) == response.accepted + num_own
        )

    def renew(self, request: int, branch: int) -> None:
        """Make it a new request to another worker; late responses to the old one are ignored."""
        self.body = msgspec.structs.replace(self.body, request=request, branch=branch)
        self.num_sent = 0
        self.is_handed_over = False
        self.response = None
