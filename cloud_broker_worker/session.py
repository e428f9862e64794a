"""What a worker keeps of one session: hidden states received, cache, and the assist that waits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from cloud_broker_worker.kv_pool import KvLease
from fleet.codec import Float16
from fleet.messages import Assist, Sampling, Token
from fleet.session import new_rows


class SessionKey(NamedTuple):
    """A session's name is only unique on its device."""

    device: str
    session: str


@dataclass
class Session:
    """`hidden_states` [max_positions, hidden] float16, of which [0, received) have arrived, [0, lease.length) have run."""

    key: SessionKey
    sampling: Sampling
    lease: KvLease
    hidden_states: Float16
    last_used: float
    received: int = 0
    assist: Assist | None = None
    assist_expires: float = 0.0
    answer: Token | None = None
    gap_reported: int | None = field(default=None)

    def take(self, start: int, rows: Float16) -> bool:
        """Stores what is new of a chunk from position `start`; False when positions before it are missing."""
        count = new_rows(self.received, start, len(rows))
        if count is None:
            return False
        if count:
            self.hidden_states[self.received : self.received + count] = rows[-count:]
            self.received += count
            self.gap_reported = None
        return True

    @property
    def num_pending(self) -> int:
        """Positions to run before the waiting assist can be answered; 0 when none waits or context is missing."""
        if self.assist is None or self.assist.position >= self.received:
            return 0
        return self.assist.position + 1 - self.lease.length

    def pending(self, count: int) -> Float16:
        """The next `count` hidden states [count, hidden] float16 that have not run."""
        start = self.lease.length
        return self.hidden_states[start : start + count]


def empty_hidden_states(max_positions: int, hidden_size: int) -> Float16:
    return np.empty((max_positions, hidden_size), np.float16)
