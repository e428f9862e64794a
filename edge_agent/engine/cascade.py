"""One sequence on its way through the blocks: token ids, KV caches, block outputs, and how far each block has run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Final

import numpy as np
import onnxruntime as ort

from edge_agent.engine.partition import ExitCandidates, Float32, Partition, bind_input, bind_output

Turn = Callable[[], AbstractContextManager[None]]

PAST: Final = "past."
PRESENT: Final = "present."
MAX_CHUNK: Final = 256
"""Positions that a block runs at once: what it needs beside the caches stays small, however long a prompt is."""


class Cascade:
    """The state of one sequence of at most `capacity` positions.

    Block 0 runs over embedded tokens; block i over the outputs of block i - 1. A block that is run takes every position
    that the block before it has and it has not: the backlog of early exits and the newest position, in chunks, so that
    no KV cache ever has a hole (CE-CoLLM, arXiv 2411.02829, section 4).

    Positions from `one_by_one_from` on run one at a time. A chunk is cheaper, but rounds otherwise than its positions
    alone, and quantised activations make of the last bit of a float a step of their grid.
    """

    def __init__(
        self, partition: Partition, capacity: int, one_by_one_from: int | None = None
    ) -> None:
        self.capacity = capacity
        self.num_tokens = 0
        self._one_by_one_from = capacity if one_by_one_from is None else one_by_one_from
        self._partition = partition
        self._token_ids = np.zeros(capacity, np.int64)
        exit_hidden = np.empty((1, partition.manifest.model.hidden_size), np.float32)
        self._lm_head = partition.lm_head(exit_hidden)
        self._runs = [_BlockRun(session, capacity, exit_hidden) for session in partition.blocks]

    @staticmethod
    def num_bytes(partition: Partition, capacity: int) -> int:
        """What a sequence of `capacity` positions takes: ids, and for each block its caches and outputs."""
        model = partition.manifest.model
        caches = sum(
            past.name.startswith(PAST) for block in partition.blocks for past in block.get_inputs()
        )
        floats = (
            caches * model.num_key_value_heads * model.head_dim
            + len(partition.blocks) * model.hidden_size
        )
        return int(
            capacity * (np.dtype(np.int64).itemsize + floats * np.dtype(np.float32).itemsize)
        )

    def append(self, token_ids: Sequence[int]) -> None:
        """Adds tokens; nothing runs yet. The caller keeps within `capacity`."""
        end = self.num_tokens + len(token_ids)
        self._token_ids[self.num_tokens : end] = token_ids
        self.num_tokens = end

    def run(self, block: int, turn: Turn = nullcontext) -> ExitCandidates:
        """Runs `block` over all that waits for it; the exit's candidates for the newest position.

        Each chunk runs inside a `turn()`, so that sequences which share one take turns even over long prompts.
        """
        while True:
            with turn():
                if self._run_chunk(block):
                    self._partition.work.head_calls += 1
                    return self._lm_head()

    def fill(self, block: int, turn: Turn = nullcontext) -> None:
        """Runs `block` over all that waits for it, as :meth:`run` does, and asks its exit nothing."""
        is_done = self._num_waiting(block) == 0
        while not is_done:
            with turn():
                is_done = self._run_chunk(block)

    def _num_waiting(self, block: int) -> int:
        return (self._runs[block - 1].filled if block else self.num_tokens) - self._runs[
            block
        ].filled

    def _run_chunk(self, block: int) -> bool:
        """Runs the next chunk of `block`, if one waits; whether that was the last."""
        waiting = self._num_waiting(block)
        start = self._runs[block].filled
        count = min(waiting, MAX_CHUNK, max(1, self._one_by_one_from - start))
        if count:
            self._runs[block](self._inputs(block, start, start + count))
            self._partition.work.positions[block] += count
        return count == waiting

    def _inputs(self, block: int, start: int, stop: int) -> Float32:
        """What `block` runs over, [n, hidden] for positions [start, stop)."""
        if block:
            return self._runs[block - 1].hidden_states[start:stop]
        return self._partition.embed(self._token_ids[start:stop])

    def truncate(self, num_tokens: int) -> None:
        """Forgets every position from `num_tokens` on, in every block; nothing is copied."""
        self.num_tokens = min(self.num_tokens, num_tokens)
        for run in self._runs:
            run.filled = min(run.filled, num_tokens)

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
        return [cache[0, :, : run.filled] for cache in run.caches]


class _BlockRun:
    """One block for one sequence. What stays in place is bound once; a step of one position binds nothing at all."""

    def __init__(self, session: ort.InferenceSession, capacity: int, exit_hidden: Float32) -> None:
        hidden = exit_hidden.shape[1]
        pasts = {
            value.name: value.shape for value in session.get_inputs() if value.name.startswith(PAST)
        }
        self.filled = 0
        self.hidden_states = np.empty((capacity, hidden), np.float32)
        self.caches = [
            np.zeros((1, heads, capacity, dim), np.float32) for _, heads, _, dim in pasts.values()
        ]
        self._session = session
        self._exit_hidden = exit_hidden  # a binding does not keep what it reads and writes alive
        self._seqlens_k = np.zeros(1, np.int32)
        self._total_length = np.zeros((), np.int32)
        self._one_input = np.empty((1, 1, hidden), np.float32)
        self._one_output = np.empty((1, 1, hidden), np.float32)
        self._chunk = self._bind(pasts)
        self._step = self._bind(pasts)
        bind_input(self._step, "input", self._one_input)
        bind_output(self._step, "hidden_states", self._one_output)

    def _bind(self, pasts: dict[str, list[int]]) -> ort.IOBinding:
        binding = self._session.io_binding()
        for past, cache in zip(pasts, self.caches, strict=True):
            bind_input(binding, past, cache)
            bind_output(binding, past.replace(PAST, PRESENT, 1), cache)
        bind_input(binding, "seqlens_k", self._seqlens_k)
        bind_input(binding, "total_length", self._total_length)
        bind_output(binding, "exit_hidden", self._exit_hidden)
        return binding

    def __call__(self, hidden_states: Float32) -> None:
        """Runs over the next positions, [n, hidden]; `exit_hidden` is then that of the last."""
        end = self.filled + len(hidden_states)
        self._seqlens_k[0] = end - 1
        self._total_length[()] = end
        if len(hidden_states) == 1:
            self._one_input[0] = hidden_states
            self._session.run_with_iobinding(self._step)
            self.hidden_states[self.filled] = self._one_output[0, 0]
        else:
            bind_input(self._chunk, "input", hidden_states[None])
            bind_output(self._chunk, "hidden_states", self.hidden_states[None, self.filled : end])
            self._session.run_with_iobinding(self._chunk)
        self.filled = end
