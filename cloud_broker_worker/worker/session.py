"""What a worker keeps of one session: hidden states received, perhaps a cache, and the question that waits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from cloud_broker_worker.worker.kv_pool import HiddenStore, KvLease
from fleet.protocol.hidden_states import Float16
from fleet.protocol.messages import Assist, Open, Token, Verified, Verify
from fleet.protocol.session import new_rows


class SessionKey(NamedTuple):
    """A session's name is only unique on its device."""

    device: str
    session: str


class TokenChoice(NamedTuple):
    """The worker's token after a position, and its log-probability at temperature 1."""

    token_id: int
    logprob: float


@dataclass(kw_only=True)
class VerifyJob:
    """An assist or a verify that waits. Both ask for the tokens after positions [first, stop).

    `choices` are those that have been made, from `first` on. It has begun once a step had positions of its session.
    """

    message: Assist | Verify
    arrived: float
    expires: float
    choices: list[TokenChoice] = field(default_factory=list)
    has_begun: bool = False

    @property
    def draft(self) -> tuple[int, ...]:
        """What the device thinks that the tokens are; an assist has no opinion."""
        return self.message.draft if isinstance(self.message, Verify) else ()

    @property
    def trusted(self) -> tuple[int, ...]:
        """Indices of the draft's tokens that are the answer's without a choice."""
        return self.message.trusted if isinstance(self.message, Verify) else ()

    @property
    def first(self) -> int:
        return self.message.start if isinstance(self.message, Verify) else self.message.position

    @property
    def stop(self) -> int:
        return self.first + (len(self.draft) or 1)

    @property
    def next_choice(self) -> int:
        """The position after which the next token is to be chosen."""
        return self.first + len(self.choices)

    def judged(self, stop: int) -> list[int]:
        """The positions before `stop` after which tokens are still to be chosen, without those that are trusted."""
        return [
            i
            for i in range(self.next_choice, min(stop, self.stop))
            if i - self.first not in self.trusted
        ]

    @property
    def num_accepted(self) -> int:
        """How many of the choices are the draft's, up to the first that is not."""
        same = (
            choice.token_id == token_id
            for choice, token_id in zip(self.choices, self.draft, strict=False)
        )
        return next(
            (i for i, is_same in enumerate(same) if not is_same),
            min(len(self.choices), len(self.draft)),
        )

    @property
    def is_decided(self) -> bool:
        """Whether all choices are made that matter: behind a rejected token none does."""
        return self.next_choice == self.stop or self.num_accepted < len(self.choices)


@dataclass(eq=False, kw_only=True)
class Session:
    """Positions [0, received) have arrived, and [0, length) are in the cache.

    `branch` counts rejected drafts. Without a `lease` nothing is in the cache; it is built again when it is needed.
    """

    key: SessionKey
    opening: Open
    store: HiddenStore
    last_used: float
    branch: int
    received: int = 0
    lease: KvLease | None = None
    question: VerifyJob | None = None
    answer: Token | Verified | None = None
    last_request: int = -1
    drafts: bool = False
    gap_reported: int | None = None
    unacknowledged_bytes: int = 0
    receipt_repeated: int | None = None

    def take(self, start: int, rows: Float16) -> int | None:
        """Stores what is new of a chunk from position `start`; how much that was, None where positions are missing."""
        count = new_rows(self.received, start, len(rows))
        if count:
            self.store.rows[self.received : self.received + count] = rows[-count:]
            self.received += count
        return count

    def ask(self, message: Assist | Verify, now: float) -> None:
        """Makes it the question that waits. One that waits already keeps its place, with a later deadline."""
        expires = now + message.deadline_ms / 1000
        if self.question and self.question.message == message:
            self.question.expires = max(expires, self.question.expires)
            return
        self.question = VerifyJob(message=message, arrived=now, expires=expires)
        self.last_request = message.request
        self.drafts = isinstance(message, Verify)

    def is_on(self, branch: int) -> bool:
        """Whether a message of `branch` is about the session as it is.

        On a branch that the worker has not seen the session starts afresh: how much the two have in common only the
        device knows.
        """
        if branch > self.branch:
            self.rewind(0, branch)
        return branch == self.branch

    def rewind(self, num_positions: int, branch: int) -> None:
        """Forgets every position from `num_positions` on, and goes over to `branch`."""
        self.branch = branch
        self.received = min(self.received, num_positions)
        if self.lease:
            self.lease.length = min(self.lease.length, num_positions)
        self.question = None
        self.gap_reported = self.receipt_repeated = None
        self.unacknowledged_bytes = 0

    def owes_receipt(self, num_bytes: int, limit_bytes: int, *, is_repeat: bool) -> bool:
        """Whether a chunk of that size makes a receipt due: when `limit_bytes` came since the last one, and once to a
        device that sends again what is here, for it may have missed that one."""
        self.unacknowledged_bytes += num_bytes
        again = is_repeat and self.receipt_repeated != self.received
        if again:
            self.receipt_repeated = self.received
        if not again and self.unacknowledged_bytes < limit_bytes:
            return False
        self.unacknowledged_bytes = 0
        return True

    @property
    def capacity(self) -> int:
        return self.store.capacity

    @property
    def length(self) -> int:
        return self.lease.length if self.lease else 0

    @property
    def next_position(self) -> int:
        """Where the next chunk starts. A question about a position that has run already runs that position again."""
        return self.length if self.question is None else min(self.length, self.question.next_choice)

    @property
    def num_pending(self) -> int:
        """Positions to run before the waiting question can be answered; 0 when none waits or context is missing."""
        if self.question is None or self.question.stop > self.received:
            return 0
        return self.question.stop - self.next_position
