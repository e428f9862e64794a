"""The hidden states of a session from its first position on, and the progress of their upload."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np

from fleet.graphs.partition import Float32
from fleet.protocol.codec import TOKEN_BYTES, TOKEN_DTYPE, pack_chunk
from fleet.protocol.hidden_states import FLOAT16, row_bytes
from fleet.protocol.messages import ContextChunk, Opened

MAX_FLOAT16: Final = np.finfo(np.float16).max


class UploadBuffer:
    """The hidden states of positions [0, available) in FP16, and with `has_tokens` their tokens.

    Positions [0, sent) have been sent, and the worker has acknowledged [0, acknowledged). At most
    one window of the worker lies between `acknowledged` and `sent`. To repair a loss, `sent` moves
    back.
    """

    def __init__(
        self,
        capacity: int,
        hidden_size: int,
        dtype: str = FLOAT16,
        *,
        has_tokens: bool = False,
    ) -> None:
        self.branch = 0
        self.available = 0
        self.sent = 0
        self.acknowledged = 0
        self._rows = np.empty((capacity, hidden_size), np.float16)
        self._tokens = np.empty(capacity, TOKEN_DTYPE) if has_tokens else None
        self._preferred_dtype = dtype
        self._dtype = FLOAT16
        self._max_chunk = 1
        self._window = 1
        self._stalled_at: float | None = None

    def add(self, hidden_states: Float32, tokens: Sequence[int] = ()) -> None:
        """Add the hidden states [n, hidden] float32 of the next positions, and their tokens [n] if
        the session's rules need them. Values beyond the range of FP16 are clipped.
        """
        end = self.available + len(hidden_states)
        if self._tokens is not None:
            self._tokens[self.available : end] = tokens
        self._rows[self.available : end] = np.clip(hidden_states, -MAX_FLOAT16, MAX_FLOAT16)
        self.available = end

    def rewind(self, num_positions: int) -> None:
        """Drop every position from `num_positions` on and begin the next branch."""
        self.branch += 1
        self.available = min(self.available, num_positions)
        self.sent = min(self.sent, num_positions)
        self.acknowledged = min(self.acknowledged, num_positions)

    def begin(self, opened: Opened, num_continued: int = 0) -> None:
        """Continue after the positions that the worker has, within the limits of its `Opened`.

        It may have the first `num_continued` before they are available here.
        """
        self._dtype = self._preferred_dtype if self._preferred_dtype in opened.dtypes else FLOAT16
        size = row_bytes(self._rows.shape[1], self._dtype)
        size += 0 if self._tokens is None else TOKEN_BYTES
        self._max_chunk = max(1, opened.max_chunk_bytes // size)
        self._window = max(self._max_chunk, opened.window_bytes // size)
        self.acknowledged = min(opened.received, max(self.available, num_continued))
        self.sent = self.acknowledged
        self._stalled_at = None

    def acknowledge(self, count: int) -> None:
        """Record that positions [0, count) have arrived at the worker."""
        if count > self.acknowledged:
            self.acknowledged = max(self.acknowledged, min(count, self.available))
            self.sent = max(self.sent, self.acknowledged)
            self._stalled_at = None

    def go_back(self, expected: int) -> None:
        """Send again from position `expected` on, which is the first that the worker lacks."""
        self.sent = min(self.sent, expected)
        self.acknowledge(expected)

    def next_chunk(self, now: float, patience_s: float) -> ContextChunk | None:
        """Return the next chunk, or None when everything is sent or the window is full.

        A window that is full for `patience_s` seconds means that chunks or receipts were lost. The
        buffer then sends again from the first position that is not acknowledged.
        """
        if self.sent >= self.available:
            return None
        if self._room <= 0 and not self._is_stall_over(now, patience_s):
            return None
        self._stalled_at = None
        start = self.sent
        self.sent = min(self.available, start + min(self._max_chunk, self._room))
        rows = self._rows[start : self.sent]
        tokens = None if self._tokens is None else self._tokens[start : self.sent]
        return pack_chunk(self.branch, start, rows, self._dtype, tokens)

    def retry_at(self, patience_s: float) -> float:
        """Return the time at which a full window is sent again, or infinity if it is not full."""
        if self._stalled_at is None or self._room > 0:
            return math.inf
        return self._stalled_at + patience_s

    def _is_stall_over(self, now: float, patience_s: float) -> bool:
        """Record that the window is full. When it has been full for `patience_s` seconds, go back
        to the first position that is not acknowledged and return True.
        """
        if self._stalled_at is None:
            self._stalled_at = now
        if now - self._stalled_at < patience_s:
            return False
        self.sent = self.acknowledged
        return True

    @property
    def _room(self) -> int:
        """The number of positions that still fit into the window."""
        return self.acknowledged + self._window - self.sent
