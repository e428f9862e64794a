"""The worker's state of one session: the hidden states that have arrived, the cache if there is
one, and the pending verify job.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from cloud_broker_worker.worker.kv_pool import HiddenStore, KvLease
from fleet.constraints.token_constraint import TokenConstraint
from fleet.protocol.hidden_states import Float16
from fleet.protocol.messages import Open, TopTokens, Verified, Verify
from fleet.protocol.session import new_rows

if TYPE_CHECKING:
    from cloud_broker_worker.worker.lower_layers import PromptRun


class SessionKey(NamedTuple):
    """The key of a session. A session's name alone is unique only on its device."""

    device: str
    session: str


class TokenChoice(NamedTuple):
    """The worker's token after a position, and its log-probability at temperature 1.

    `top` has the best tokens, as many as the session's rules ask for.
    """

    token_id: int
    logprob: float
    top: TopTokens = ()


@dataclass(kw_only=True)
class VerifyJob:
    """A pending verify request, for the tokens after positions [first, stop).

    `choices` are the tokens chosen so far, starting with the one after `first`. `has_begun` is set
    by the first step that runs positions of the job's session.
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
        """The position after which the worker has to choose the next token."""
        return self.first + len(self.choices)

    def undecided_positions(self, stop: int) -> list[int]:
        """Return the untrusted positions before `stop` after which no token is chosen yet."""
        return [
            i
            for i in range(self.next_choice, min(stop, self.stop))
            if i - self.first not in self.trusted
        ]

    @property
    def num_accepted(self) -> int:
        """Number of choices that equal the draft, before the first one that differs."""
        pairs = zip(self.choices, self.draft, strict=False)
        for i, (choice, token_id) in enumerate(pairs):
            if choice.token_id != token_id:
                return i
        return min(len(self.choices), len(self.draft))

    @property
    def is_decided(self) -> bool:
        """Whether the verdict is known: all tokens are chosen, or one of the draft is rejected."""
        return self.next_choice == self.stop or self.num_accepted < len(self.choices)


@dataclass(eq=False, kw_only=True)
class Session:
    """A session of which positions [0, received) have arrived and [0, length) are in the cache.

    `branch` grows with each rejected draft and each withdrawn request. A session without a `lease`
    has no cache; the cache is built again when a step needs it. `holds_drafts` is set by the first
    job, because later context may belong to drafts. `gone_since` is the time at which the device
    went offline. `is_kept` is set when the device has ended the session and may continue it with
    another one. The hidden states enter `first_layer`; 0 is the lowest layer of the cloud's half.
    `tokens` are those of the received positions, if the session's rules need them or they came in
    place of hidden states. The hidden states of positions [0, num_ids) are computed from them, by
    `prompt_run` while that lasts; those of positions [0, num_computed) are here. `constraint`
    follows the answer if the rules have one.
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
    gone_since: float | None = None
    is_kept: bool = False
    first_layer: int = 0
    tokens: list[int] = field(default_factory=list)
    num_ids: int = 0
    num_computed: int = 0
    prompt_run: PromptRun | None = None
    constraint: TokenConstraint | None = None

    def add_rows(self, start: int, rows: Float16 | None, tokens: Sequence[int] = ()) -> int | None:
        """Store the new rows of a chunk from position `start`, and their tokens.

        Without rows they are to be computed from the tokens. Return the number of new rows, or None
        if positions before them are missing.
        """
        count = new_rows(self.received, start, len(tokens) if rows is None else len(rows))
        if count:
            stop = self.received + count
            if rows is None:
                self.num_ids = stop
            else:
                self.store.rows[self.received : stop] = rows[-count:]
            self.tokens[self.received :] = tokens[-count:]
            self.received = stop
        return count

    def use(self, now: float) -> None:
        """Record a message of the device."""
        self.last_used = now
        self.gone_since = None
        self.is_kept = False

    def leave(self, now: float, unused_since: float) -> None:
        """Stop all work, because the device went offline."""
        self.job = None
        self.prompt_run = None
        self.gone_since = now
        self.last_used = min(self.last_used, unused_since)

    def keep(self) -> None:
        """Stop all work, and wait for a session that continues this one."""
        self.job = None
        self.prompt_run = None
        self.is_kept = True

    def take(self, earlier: Session, num_positions: int) -> None:
        """Begin with the first positions of a session that ends; get all of its memory."""
        own_store = self.store
        self.store = earlier.store
        earlier.store = own_store
        self.lease = earlier.lease
        earlier.lease = None
        self.tokens = earlier.tokens
        self.num_ids = earlier.num_ids
        self.num_computed = earlier.num_computed
        self.received = earlier.received
        self.rewind(num_positions, self.branch)

    def add_job(self, message: Verify, now: float) -> None:
        """Make the request the pending job. A repeated request keeps its arrival time and gets the
        later of the two deadlines.
        """
        expires = now + message.deadline_ms / 1000
        if self.job and self.job.message == message:
            self.job.expires = max(expires, self.job.expires)
            return
        self.job = VerifyJob(message=message, arrived=now, expires=expires)
        self.last_request = message.request
        self.holds_drafts = True

    def is_on(self, branch: int) -> bool:
        """Return whether a message of `branch` belongs to the session's current branch.

        If the branch is newer, the session starts again from position 0, because only the device
        knows which positions the two branches share.
        """
        if branch > self.branch:
            self.rewind(0, branch)
        return branch == self.branch

    def rewind(self, num_positions: int, branch: int) -> None:
        """Drop every position from `num_positions` on and continue on `branch`."""
        self.branch = branch
        self.received = min(self.received, num_positions)
        del self.tokens[num_positions:]
        if num_positions < self.num_ids:
            self.num_ids = num_positions
            self.prompt_run = None
        self.num_computed = min(self.num_computed, num_positions)
        if self.lease:
            self.lease.length = min(self.lease.length, num_positions)
        self.job = None
        self.gap_reported = None
        self.receipt_repeated = None
        self.unacknowledged_bytes = 0

    def owes_receipt(self, num_bytes: int, limit_bytes: int, *, is_repeat: bool) -> bool:
        """Return whether a chunk of `num_bytes` makes a receipt due.

        A receipt is due when `limit_bytes` have come since the last one. It is also due, once, when
        the device repeats positions that have arrived: the device may have missed the last receipt.
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
        """The largest number of positions. The store grows up to it as positions arrive."""
        return self.opening.max_positions

    @property
    def length(self) -> int:
        return self.lease.length if self.lease else 0

    @property
    def awaits_rows(self) -> bool:
        """Whether hidden states are to be computed from tokens."""
        return self.num_computed < self.num_ids

    @property
    def num_ready(self) -> int:
        """The number n of positions [0, n) whose hidden states are here."""
        return self.num_computed if self.awaits_rows else self.received

    @property
    def num_ahead(self) -> int:
        """Number of positions that can run before a job needs them. The newest one is left out."""
        return max(0, min(self.num_ready, self.received - 1) - self.length)

    @property
    def next_position(self) -> int:
        """The first position of the next chunk. A position that has run is run again if the job
        needs its logits.
        """
        return self.length if self.job is None else min(self.length, self.job.next_choice)

    @property
    def num_pending(self) -> int:
        """Number of positions to run before the job can be decided. It is 0 if there is no job, or
        if the job's context is not here yet.
        """
        if self.job is None or self.job.stop > self.num_ready:
            return 0
        return self.job.stop - self.next_position
