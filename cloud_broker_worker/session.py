"""What a worker keeps of one session: hidden states received, cache, and the assist that waits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from cloud_broker_worker.kv_pool import KvLease
from fleet.codec import Float16
from fleet.messages import Assist, Open, Token
from fleet.session import new_rows


class SessionKey(NamedTuple):
    """A session's name is only unique on its device."""

    device: str
    session: str


@dataclass
class Session:
    """Of the lease's positions [0, received) have arrived and [0, lease.length) have run."""

    key: SessionKey
    opening: Open
    lease: KvLease
    last_used: float
    received: int = 0
    assist: Assist | None = None
    assist_expires: float = 0.0
    answer: Token | None = None
    gap_reported: int | None = None

    def take(self, start: int, rows: Float16) -> bool:
        """Stores what is new of a chunk from position `start`; False when positions before it are missing."""
        count = new_rows(self.received, start, len(rows))
        if count is None:
            return False
        if count:
            self.lease.hidden_states[self.received : self.received + count] = rows[-count:]
            self.received += count
        return True

    def is_idle(self, since: float) -> bool:
        """Whether no assist waits and nothing came after `since`."""
        return self.assist is None and self.last_used <= since

    @property
    def next_position(self) -> int:
        """Where the next chunk starts. An assist for a position that has run already runs that position again."""
        return self.lease.length if self.assist is None else min(self.lease.length, self.assist.position)

    @property
    def num_pending(self) -> int:
        """Positions to run before the waiting assist can be answered; 0 when none waits or context is missing."""
        if self.assist is None or self.assist.position >= self.received:
            return 0
        return self.assist.position + 1 - self.next_position
