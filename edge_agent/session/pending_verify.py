"""The verify request that a session has sent or is about to send. A session has at most one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import msgspec

from fleet.protocol.messages import Verified, Verify

MS_PER_POSITION: Final = 10  # added to the deadline for each position that the worker runs first
MAX_DEADLINE_MS: Final = 600_000


def verify_deadline_ms(base_ms: int, num_pending: int) -> int:
    """Return the deadline of a verify request for which `num_pending` positions must run first."""
    return min(base_ms + MS_PER_POSITION * num_pending, MAX_DEADLINE_MS)


@dataclass(kw_only=True)
class PendingVerify:
    """A verify request and the number of times that it has been sent.

    The worker has `body.deadline_ms` milliseconds from `first_sent_at` on. At `abandon_at` the
    device continues without a verdict. A request that has an `abandon_at` is not repeated to
    another worker when the session is lost. All times are seconds of one clock.
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
        """The number n of positions [0, n) that the worker needs for its verdict."""
        return self.body.start + len(self.body.draft)

    def accepts(self, response: Verified) -> bool:
        """Return whether the verdict has this request's number and fits its draft."""
        num_own = 0 if response.token_id is None else 1
        return (
            self.body.request == response.request
            and self.body.start == response.start
            and response.accepted + num_own == min(len(self.body.draft), response.accepted + 1)
            and len(response.logprobs) == response.accepted + num_own
        )

    def renew(self, request: int, branch: int) -> None:
        """Make it a new request, after a new opening. Late verdicts on the old one are ignored."""
        self.body = msgspec.structs.replace(self.body, request=request, branch=branch)
        self.num_sent = 0
        self.is_handed_over = False
        self.response = None
