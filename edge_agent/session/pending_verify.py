"""What a session asks its worker, one at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec

from fleet.protocol.messages import Verified, Verify


@dataclass(kw_only=True)
class PendingVerify:
    """A verify on its way; the cloud has `body.deadline_ms` from the time that it is sent.

    At `give_up_at`, in monotonic seconds, nobody waits for it any more; one that is given up never waits for another
    worker, either.
    """

    body: Verify
    give_up_at: float = math.inf
    answer: Verified | None = None
    asked_at: float = 0.0
    send_at: float = 0.0
    num_sent: int = 0
    has_gone: bool = False  # to the network

    @property
    def wait_s(self) -> float:
        return self.body.deadline_ms / 1000

    @property
    def num_positions(self) -> int:
        """The worker needs positions [0, n) for its answer."""
        return self.body.start + len(self.body.draft)

    def is_answered_by(self, answer: Verified) -> bool:
        """Whether `answer` has this question's number and can be an answer to it."""
        num_own = 0 if answer.token_id is None else 1
        return (
            self.body.request == answer.request
            and self.body.start == answer.start
            and answer.accepted + num_own == min(len(self.body.draft), answer.accepted + 1)
            and len(answer.logprobs) == answer.accepted + num_own
        )

    def renew(self, request: int, branch: int) -> None:
        """Makes it a new question to another worker, so that a late answer of the earlier one is not taken."""
        self.body = msgspec.structs.replace(self.body, request=request, branch=branch)
        self.num_sent = 0
        self.has_gone = False
        self.answer = None
