"""The hidden states of a session from its first position on, and the progress of their upload."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np

from fleet.graphs.partition import Float32
from fleet.protocol.codec import TOKEN_BYTES, TOKEN_DTYPE, pack_chunk, pack_token_ids
from fleet.protocol.hidden_states import FLOAT16, TOKENS, row_bytes, to_float16
from fleet.protocol.messages import ContextChunk, Opened

MAX_IDS_SHARE: Final = 0.5
"""The largest part of a worker's window that token ids may fill: it sends no receipt for them."""


class UploadBuffer:
    """The hidden states of a session's first positions in FP16, and with `has_tokens` their tokens.

    A worker that accepts it gets the prompt as token ids, also before its hidden states are here.
    Those are kept for other workers. Positions [0, available) can be sent to the present one.

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
        prompt_ids: Sequence[int] = (),
    ) -> None:
        self.branch = 0
        self.sent = 0
        self.acknowledged = 0
        self._num_rows = 0
        self._prompt_ids = np.array(prompt_ids, TOKEN_DTYPE)
        self._num_ids = 0  # the positions that the present worker gets as token ids
        self._max_ids = 1
        self._rows = np.empty((capacity, hidden_size), np.float16)
        self._tokens = np.empty(capacity, TOKEN_DTYPE) if has_tokens else None
        self._preferred_dtype = dtype
        self._dtype = FLOAT16
        self._max_chunk = 1
        self._window = 1
        self._stalled_at: float | None = None

    @property
    def available(self) -> int:
        """The number n of positions [0, n) that can be sent."""
        return max(self._num_rows, self._num_ids)

    @property
    def has_sent_ids(self) -> bool:
        """Whether the present worker gets the prompt as token ids."""
        return self._num_ids > 0

    def add(self, hidden_states: Float32, tokens: Sequence[int] = ()) -> None:
        """Add the hidden states [n, hidden] float32 of the next positions, and their tokens [n] if
        the session's rules need them. Values beyond the range of FP16 are clipped.
        """
        start = self._num_rows
        self._num_rows = start + len(hidden_states)
        if self._tokens is not None:
            self._tokens[start : self._num_rows] = tokens
        self._rows[start : self._num_rows] = to_float16(hidden_states)

    def rewind(self, num_positions: int) -> None:
        """Drop every position from `num_positions` on and begin the next branch."""
        self.branch += 1
        self._num_rows = min(self._num_rows, num_positions)
        self._prompt_ids = self._prompt_ids[:num_positions]
        self._num_ids = min(self._num_ids, num_positions)
        self.sent = min(self.sent, num_positions)
        self.acknowledged = min(self.acknowledged, num_positions)

    def begin(self, opened: Opened, num_continued: int = 0) -> None:
        """Continue after the positions that the worker has, within the limits of its `Opened`.

        It may have the first `num_continued` before they are available here. It then gets hidden
        states only, since it would have to run the lower layers from position 0 on.
        """
        accepts_ids = TOKENS in opened.dtypes and not (num_continued and opened.received)
        max_ids = int(opened.window_bytes * MAX_IDS_SHARE) // TOKEN_BYTES
        self._num_ids = min(len(self._prompt_ids), max_ids) if accepts_ids else 0
        self._max_ids = opened.max_chunk_bytes // TOKEN_BYTES
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
        if start < self._num_ids:
            self.sent = min(self._num_ids, start + self._max_ids)
            return pack_token_ids(self.branch, start, self._prompt_ids[start : self.sent])
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
        """The number of positions that still fit into the window, next to token ids."""
        return max(self.acknowledged, self._num_ids) + self._window - self.sent
