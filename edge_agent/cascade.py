"""One sequence on its way through the blocks: token ids, KV caches, block outputs, and how far each block has run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import onnxruntime as ort

from edge_agent.partition import Candidates, Float32, Int64, Partition

PAST: Final = "past."
PRESENT: Final = "present."


class Cascade:
    """The state of one sequence of at most `capacity` positions.

    Block 0 runs over token ids; block i over the outputs of block i - 1. A block that is run takes every position
    that the block before it has and it has not: the backlog of early exits and the newest position, as one chunk,
    so that no KV cache ever has a hole (CE-CoLLM, arXiv 2411.02829, section 4).
    """

    def __init__(self, partition: Partition, capacity: int) -> None:
        model = partition.manifest.model
        self.capacity = capacity
        self.num_tokens = 0
        self._partition = partition
        self._token_ids = np.zeros((1, capacity), np.int64)
        self._runs = [
            _BlockRun(session, capacity, model.hidden_size, model.num_key_value_heads, model.head_dim)
            for session in partition.blocks
        ]

    def append(self, token_ids: Sequence[int]) -> None:
        """Adds tokens; nothing runs yet. The caller keeps within `capacity`."""
        end = self.num_tokens + len(token_ids)
        self._token_ids[0, self.num_tokens : end] = token_ids
        self.num_tokens = end

    def run(self, block: int) -> Candidates:
        """Runs `block` over all that waits for it; the exit's candidates for the newest position."""
        run = self._runs[block]
        waiting: Int64 | Float32
        if block == 0:
            waiting = self._token_ids[:, run.filled : self.num_tokens]
        else:
            before = self._runs[block - 1]
            waiting = before.hidden_states[None, run.filled : before.filled]
        return self._partition.candidates(run(waiting))

    def num_filled(self, block: int) -> int:
        """Positions [0, n) that `block` has run."""
        return self._runs[block].filled

    def hidden_states(self, block: int, start: int) -> Float32:
        """The outputs [n, hidden] float32 of `block` from position `start` on; a view."""
        run = self._runs[block]
        return run.hidden_states[start : run.filled]

    def caches(self, block: int) -> list[Float32]:
        """Keys and values [kv_heads, filled, head_dim] float32 of the block's layers, in order; views.

        The last pair is the exit head's where that has a layer of its own.
        """
        run = self._runs[block]
        return [buffer[0, :, : run.filled] for buffer in run.buffers]


class _BlockRun:
    """One block's buffers for one sequence, bound once; the caches are written in place."""

    def __init__(self, session: ort.InferenceSession, capacity: int, hidden: int, kv_heads: int, head_dim: int) -> None:
        pasts = [value.name for value in session.get_inputs() if value.name.startswith(PAST)]
        self.filled = 0
        self.hidden_states = np.empty((capacity, hidden), np.float32)
        self.buffers = [np.zeros((1, kv_heads, capacity, head_dim), np.float32) for _ in pasts]
        self._session = session
        self._binding = session.io_binding()
        self._exit_hidden = np.empty((1, hidden), np.float32)
        self._seqlens_k = np.zeros(1, np.int32)
        self._total_length = np.zeros((), np.int32)
        self._values = []  # OrtValues borrow the arrays: both must live as long as the binding
        for past, buffer in zip(pasts, self.buffers, strict=True):
            value = ort.OrtValue.ortvalue_from_numpy(buffer)
            self._values.append(value)
            self._binding.bind_ortvalue_input(past, value)
            self._binding.bind_ortvalue_output(past.replace(PAST, PRESENT, 1), value)
        self._bind_output("exit_hidden", self._exit_hidden)

    def _bind_output(self, name: str, array: Float32) -> None:
        self._binding.bind_output(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)

    def __call__(self, waiting: Int64 | Float32) -> Float32:
        """Runs over `waiting`, [1, n] int64 or [1, n, hidden] float32; gives exit_hidden [1, hidden] of the last."""
        end = self.filled + waiting.shape[1]
        self._seqlens_k[0], self._total_length[()] = end - 1, end
        self._binding.bind_cpu_input("input", waiting)
        self._binding.bind_cpu_input("seqlens_k", self._seqlens_k)
        self._binding.bind_cpu_input("total_length", self._total_length)
        self._bind_output("hidden_states", self.hidden_states[None, self.filled : end])
        self._session.run_with_iobinding(self._binding)
        self.filled = end
        return self._exit_hidden
