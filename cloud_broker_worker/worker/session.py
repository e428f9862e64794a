"""The worker's state of one session: hidden states received, perhaps a cache, and the pending
verify job.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from cloud_broker_worker.worker.kv_pool import HiddenStore, KvLease
from fleet.protocol.hidden_states import Float16
from fleet.protocol.messages import Open, Verified, Verify
from fleet.protocol.session import new_rows


class SessionKey(NamedTuple):
    """The key of a session: its name is unique only on its device."""

    device: str
    session: str


class TokenChoice(NamedTuple):
    """The worker's token after a position, and its log-probability at temperature 1."""

    token_id: int
    logprob: float


@dataclass(kw_only=True)
class VerifyJob:
    """A verify request that waits: it asks for the tokens after positions [first, stop).

    `choices` are the tokens chosen so far, from `first` on. `has_begun` is set once a step had
    positions of its session.
    """

    message: Verify
    arrived: float
    expires: float
    choices: list[TokenChoice] = field(default_factory=list)
    has_begun: bool = False

    @property
    def draft(self) -> tuple[int, ...]:
        """The tokens that the device expects."""
        return self.message.draft

    @property
    def trusted(self) -> tuple[int, ...]:
        """Indices of the draft's tokens that are accepted without a choice."""
        return self.message.trusted

    @property
    def first(self) -> int:
        return self.message.start

    @property
    def stop(self) -> int:
        return self.first + len(self.draft)

    @property
    def next_choice(self) -> int:
        """The position after which the next token is to be chosen."""
        return self.first + len(self.choices)

    def undecided_positions(self, stop: int) -> list[int]:
        """Return the untrusted positions before `stop` whose next token is still to be chosen."""
        return [
            i
            for i in range(self.next_choice, min(stop, self.stop))
            if i - self.first not in self.trusted
        ]

    @property
    def num_accepted(self) -> int:
        """Number of choices that equal the draft, up to the first that does not."""
        pairs = zip(self.choices, self.draft, strict=False)
        for i, (choice, token_id) in enumerate(pairs):
            if choice.token_id != token_id:
                return i
        return min(len(self.choices), len(self.draft))

    @property
    def is_decided(self) -> bool:
        """Whether all choices that matter are made: none does after a rejected token."""
        return self.next_choice == self.stop or self.num_accepted < len(self.choices)


@dataclass(eq=False, kw_only=True)
class Session:
    """A session of which positions [0, received) have arrived and [0, length) are in the cache.

    `branch` counts rejected drafts. Without a `lease` nothing is in the cache; it is built again on
    demand. `holds_drafts` is set by the first job: from then on context may be a draft.
    """

    key: SessionKey
    opening: Open
    store: HiddenStore
    last_used: float
    branch: int
    received: int = 0
    lease: KvLease | None = None
    job: VerifyJob | None = None
    response: Verified | None = None
    last_request: int = -1
    holds_drafts: bool = False
    gap_reported: int | None = None
    unacknowledged_bytes: int = 0
    receipt_repeated: int | None = None

    def add_rows(self, start: int, rows: Float16) -> int | None:
        """Store the new rows of a chunk from position `start`.

        Return how many are new, None where positions before them are missing.
        """
        count = new_rows(self.received, start, len(rows))
        if count:
            self.store.rows[self.received : self.received + count] = rows[-count:]
            self.received += count
        return count

    def add_job(self, message: Verify, now: float) -> None:
        """Make the request the pending job; a repeated one keeps its place, with the later
        deadline.
        """
        expires = now + message.deadline_ms / 1000
        if self.job and self.job.message == message:
            self.job.expires = max(expires, self.job.expires)
            return
        self.job = VerifyJob(message=message, arrived=now, expires=expires)
        self.last_request = message.request
        self.holds_drafts = True

    def is_on(self, branch: int) -> bool:
        """Return whether a message of `branch` is about the session's present state.

        On a branch that the worker has not seen the session starts afresh: only the device knows
        how much the two have in common.
        """
        if branch > self.branch:
            self.rewind(0, branch)
        return branch == self.branch

    def rewind(self, num_positions: int, branch: int) -> None:
        """Drop every position from `num_positions` on and continue on `branch`."""
        self.branch = branch
        self.received = min(self.received, num_positions)
        if self.lease:
            self.lease.length = min(self.lease.length, num_positions)
        self.job = None
        self.gap_reported = None
        self.receipt_repeated = None
        self.unacknowledged_bytes = 0

    def owes_receipt(self, num_bytes: int, limit_bytes: int, *, is_repeat: bool) -> bool:
        """Return whether a chunk of that size makes a receipt due.

        It does when `limit_bytes` came since the last one, and once for a device that repeats what
        is here, for it may have missed that one.
        """
        self.unacknowledged_bytes += num_bytes
        is_first_repeat = is_repeat and self.receipt_repeated != self.received
        if is_first_repeat:
            self.receipt_repeated = self.received
        if not is_first_repeat and self.unacknowledged_bytes < limit_bytes:
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
        """The first position of the next chunk; a job about a position that has run runs it
        again.
        """
        return self.length if self.job is None else min(self.length, self.job.next_choice)

    @property
    def num_pending(self) -> int:
        """Positions to run before the job can be decided; 0 without a job or when context is
        missing.
        """
        if self.job is None or self.job.stop > self.received:
            return 0
        return self.job.stop - self.next_position
