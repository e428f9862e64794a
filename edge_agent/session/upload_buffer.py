"""The hidden states of a session, kept as a whole, and the progress of their upload."""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from edge_agent.engine.partition import Float32
from fleet.protocol.codec import pack_chunk
from fleet.protocol.hidden_states import FLOAT16, row_bytes
from fleet.protocol.messages import ContextChunk, Opened

MAX_FLOAT16: Final = np.finfo(np.float16).max


class UploadBuffer:
    """Positions [0, available) in FP16; [0, sent) have been sent and [0, acknowledged) have
    arrived.

    The difference of the last two never exceeds the worker's window. Moving `sent` back repairs
    every loss.
    """

    def __init__(self, capacity: int, hidden_size: int, dtype: str = FLOAT16) -> None:
        self.branch = 0
        self.available = 0
        self.sent = 0
        self.acknowledged = 0
        self._rows = np.empty((capacity, hidden_size), np.float16)
        self._preferred_dtype = dtype
        self._dtype = FLOAT16
        self._max_chunk = 1
        self._window = 1
        self._stalled_at: float | None = None

    def add(self, hidden_states: Float32) -> None:
        """Add the next positions' hidden states [n, hidden] float32; values beyond FP16 are
        clipped.
        """
        end = self.available + len(hidden_states)
        self._rows[self.available : end] = np.clip(hidden_states, -MAX_FLOAT16, MAX_FLOAT16)
        self.available = end

    def rewind(self, num_positions: int) -> None:
        """Drop every position from `num_positions` on and begin the next branch."""
        self.branch += 1
        self.available = min(self.available, num_positions)
        self.sent = min(self.sent, num_positions)
        self.acknowledged = min(self.acknowledged, num_positions)

    def begin(self, opened: Opened) -> None:
        """Continue from the positions that the worker has, within the limits that it names."""
        self._dtype = self._preferred_dtype if self._preferred_dtype in opened.dtypes else FLOAT16
        size = row_bytes(self._rows.shape[1], self._dtype)
        self._max_chunk = max(1, opened.max_chunk_bytes // size)
        self._window = max(self._max_chunk, opened.window_bytes // size)
        self.acknowledged = min(opened.received, self.available)
        self.sent = self.acknowledged
        self._stalled_at = None

    def acknowledge(self, count: int) -> None:
        """Record that positions [0, count) have arrived."""
        if count > self.acknowledged:
            self.acknowledged = min(count, self.available)
            self.sent = max(self.sent, self.acknowledged)
            self._stalled_at = None

    def go_back(self, expected: int) -> None:
        """Send again from position `expected` on, the first that the worker lacks."""
        self.sent = min(self.sent, expected)
        self.acknowledge(expected)

    def next_chunk(self, now: float, patience_s: float) -> ContextChunk | None:
        """Return the next chunk; None when everything is sent or the window is full.

        When the window has been full for `patience_s` seconds, chunks or receipts were lost:
        sending begins again at the first position that is not acknowledged.
        """
        if self.sent >= self.available:
            return None
        if self._room <= 0 and not self._is_stall_over(now, patience_s):
            return None
        self._stalled_at = None
        start = self.sent
        self.sent = min(self.available, start + min(self._max_chunk, self._room))
        return pack_chunk(self.branch, start, self._rows[start : self.sent], self._dtype)

    def retry_at(self, patience_s: float) -> float:
        """Return the time at which a full window is sent again; infinity when it is not full."""
        if self._stalled_at is None or self._room > 0:
            return math.inf
        return self._stalled_at + patience_s

    def _is_stall_over(self, now: float, patience_s: float) -> bool:
        """Record that the window is full; after `patience_s` seconds go back to what was
        acknowledged.
        """
        if self._stalled_at is None:
            self._stalled_at = now
        if now - self._stalled_at < patience_s:
            return False
        self.sent = self.acknowledged
        return True

    @property
    def _room(self) -> int:
        """Positions that the window still has room for."""
        return self.acknowledged + self._window - self.sent
