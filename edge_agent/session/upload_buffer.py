"""The hidden states of a session, kept whole, and how far they have gone up."""

from __future__ import annotations

from typing import Final

import numpy as np

from edge_agent.engine.partition import Float32
from fleet.protocol.codec import pack_chunk
from fleet.protocol.hidden_states import FLOAT16, row_bytes
from fleet.protocol.messages import ContextChunk, Opened

LIMIT: Final = np.finfo(np.float16).max


class UploadBuffer:
    """Positions [0, available) in FP16, of which [0, sent) have been sent and [0, acknowledged) have arrived.

    What is between the last two never exceeds the worker's window. Every loss is mended by moving `sent` back.
    """

    def __init__(self, capacity: int, hidden_size: int, dtype: str = FLOAT16) -> None:
        self.branch = 0
        self.available = 0
        self.sent = 0
        self.acknowledged = 0
        self._rows = np.empty((capacity, hidden_size), np.float16)
        self._wanted_dtype = dtype
        self._dtype = FLOAT16
        self._max_chunk = 1
        self._window = 1
        self._stalled_at: float | None = None

    def add(self, hidden_states: Float32) -> None:
        """The next positions' hidden states [n, hidden] float32; what FP16 cannot hold is clipped."""
        end = self.available + len(hidden_states)
        self._rows[self.available : end] = np.clip(hidden_states, -LIMIT, LIMIT)
        self.available = end

    def rewind(self, num_positions: int) -> None:
        """Forgets every position from `num_positions` on and begins the next branch."""
        self.branch += 1
        self.available = min(self.available, num_positions)
        self.sent = min(self.sent, num_positions)
        self.acknowledged = min(self.acknowledged, num_positions)

    def begin(self, opened: Opened) -> None:
        """Goes on from what the worker has, within the limits that it names."""
        self._dtype = self._wanted_dtype if self._wanted_dtype in opened.dtypes else FLOAT16
        size = row_bytes(self._rows.shape[1], self._dtype)
        self._max_chunk = max(1, opened.max_chunk_bytes // size)
        self._window = max(self._max_chunk, opened.window_bytes // size)
        self.sent = self.acknowledged = min(opened.received, self.available)
        self._stalled_at = None

    def acknowledge(self, count: int) -> None:
        """Positions [0, count) have arrived."""
        if count > self.acknowledged:
            self.acknowledged = min(count, self.available)
            self.sent = max(self.sent, self.acknowledged)
            self._stalled_at = None

    def go_back(self, expected: int) -> None:
        """Positions from `expected` on are missing there."""
        self.sent = min(self.sent, expected)
        self.acknowledge(expected)

    def due(self, now: float, patience_s: float) -> ContextChunk | None:
        """The next chunk; None when all is sent or the window is full. After `patience_s` seconds of a full window it
        begins again behind what was acknowledged: the chunks or their receipts got lost."""
        if self.sent >= self.available:
            return None
        room = self.acknowledged + self._window - self.sent
        if room <= 0:
            if self._stalled_at is None or now - self._stalled_at < patience_s:
                self._stalled_at = self._stalled_at or now
                return None
            self._stalled_at = None
            self.sent = self.acknowledged
            room = self._window
        start = self.sent
        self.sent = min(self.available, start + min(self._max_chunk, room))
        return pack_chunk(self.branch, start, self._rows[start : self.sent], self._dtype)
