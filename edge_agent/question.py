"""What a session asks its worker, one at a time."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from fleet.messages import Assist, Token, Verified, Verify


@dataclass
class Question:
    """An assist or a verify on its way; the cloud has `body.deadline_ms` from the time that it is sent."""

    body: Assist | Verify
    answer: Token | Verified | None = None
    asked_at: float = 0.0
    send_at: float = 0.0
    num_sent: int = 0

    @property
    def wait_s(self) -> float:
        return self.body.deadline_ms / 1000

    @property
    def survives_loss(self) -> bool:
        """Whether it waits for the next worker: nobody else can answer a verify."""
        return isinstance(self.body, Verify)

    @property
    def num_positions(self) -> int:
        """The worker needs positions [0, n) for its answer."""
        body = self.body
        return body.start + len(body.draft) if isinstance(body, Verify) else body.position + 1

    def is_answered_by(self, answer: Token | Verified) -> bool:
        """Whether `answer` has this question's number and can be an answer to it."""
        body = self.body
        if body.request != answer.request:
            return False
        if isinstance(body, Assist) or isinstance(answer, Token):
            return isinstance(body, Assist) and isinstance(answer, Token) and body.position == answer.position
        num_own = 0 if answer.token_id is None else 1
        return (
            body.start == answer.start
            and answer.accepted + num_own == min(len(body.draft), answer.accepted + 1)
            and len(answer.logprobs) == answer.accepted + num_own
        )

    def renew(self, request: int, branch: int) -> None:
        """Makes it a new question to another worker, so that a late answer of the earlier one is not taken."""
        if isinstance(self.body, Verify):
            self.body = msgspec.structs.replace(self.body, request=request, branch=branch)
        else:
            self.body = msgspec.structs.replace(self.body, request=request)
        self.num_sent, self.answer = 0, None
