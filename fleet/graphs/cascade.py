"""One sequence in the blocks of the model: token ids, KV caches, block outputs, and each block's
progress.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnxruntime as ort

from fleet.graphs.partition import (
    MAX_EXITS,
    ExitCandidates,
    Float32,
    Int64,
    Partition,
    WorkCounter,
    bind_input,
    bind_output,
)

ChunkContext = Callable[[], AbstractContextManager[None]]

PAST: Final = "past."
PRESENT: Final = "present."
MAX_CHUNK: Final = 256
"""The most positions that a block runs at once. So the memory of a run, in addition to the caches,
stays small for prompts of any length.
"""
SPARE: Final = 1
"""Positions of a cache after the newest: a run writes one row more than it needs (ADR 0052)."""
TRIAL: Final = (7, 1, 5, 3, 2, 6, 4, 0)
"""The tokens by which a chunk is compared with single positions."""
LARGE_CHUNK: Final = 64
"""Number of positions from which on a run frees its working memory at its end. A smaller run keeps
the memory, because freeing it takes time.
"""


@dataclass(frozen=True)
class BlockState:
    """The state of a block over n successive positions of a sequence, in float32.

    `hidden_states` [n, hidden] are its outputs, `caches` [num_caches, kv_heads, n, head_dim] the
    keys and values of its layers.
    """

    hidden_states: Float32
    caches: Float32

    def __len__(self) -> int:
        return len(self.hidden_states)

    @property
    def num_bytes(self) -> int:
        """The memory of both arrays."""
        return self.hidden_states.nbytes + self.caches.nbytes

    def view(self, start: int, stop: int) -> BlockState:
        """Return positions [start, stop) of these, without a copy."""
        return BlockState(self.hidden_states[start:stop], self.caches[:, :, start:stop])

    def copy(self) -> BlockState:
        """Return a copy with memory of its own."""
        return BlockState(self.hidden_states.copy(), self.caches.copy())


class Cascade:
    """The state of one sequence of at most `capacity` positions.

    Block 0 runs over embedded tokens; block i over the outputs of block i - 1. A block always runs
    its whole backlog, in chunks: all positions that the previous block has run and this block has
    not. So no KV cache has a hole (CE-CoLLM, arXiv 2411.02829, section 4).

    Positions from `one_by_one_from` on run one at a time. A chunk is cheaper, but unless
    :func:`chunks_are_exact` its results differ from those of single positions by rounding. The
    quantisation of activations can enlarge this difference to a whole step of its grid.
    """

    def __init__(
        self, partition: Partition, capacity: int, one_by_one_from: int | None = None
    ) -> None:
        self.capacity = capacity
        self.num_tokens = 0
        self._one_by_one_from = capacity if one_by_one_from is None else one_by_one_from
        self._partition = partition
        self._token_ids = np.zeros(capacity, np.int64)
        self._lm_head = partition.lm_head()
        num_exits = MAX_EXITS if partition.has_all_exits else 1
        self._runs = [_BlockRun(session, capacity, num_exits) for session in partition.blocks]

    @staticmethod
    def num_bytes(partition: Partition, capacity: int) -> int:
        """Return the bytes of a sequence of `capacity` positions: ids, and the caches and outputs
        of each block.
        """
        model = partition.manifest.model
        inputs = [value for block in partition.blocks for value in block.get_inputs()]
        num_caches = sum(value.name.startswith(PAST) for value in inputs)
        num_floats = num_caches * model.num_key_value_heads * model.head_dim * (capacity + SPARE)
        num_floats += len(partition.blocks) * model.hidden_size * capacity
        float_bytes = np.dtype(np.float32).itemsize
        return int(capacity * np.dtype(np.int64).itemsize + num_floats * float_bytes)

    def append(self, token_ids: Sequence[int]) -> None:
        """Add tokens; nothing runs yet. The caller stays within `capacity`."""
        end = self.num_tokens + len(token_ids)
        self._token_ids[self.num_tokens : end] = token_ids
        self.num_tokens = end

    def load(self, token_ids: Sequence[int], blocks: Sequence[Sequence[BlockState]]) -> None:
        """Begin with tokens that have run elsewhere: copy the successive states of each block.

        A block may have run fewer positions than the one before it.
        """
        self.append(token_ids)
        for run, states in zip(self._runs, blocks, strict=False):
            for state in states:
                run.load(state)

    def state(self, block: int, start: int, stop: int) -> BlockState:
        """Return a view of positions [start, stop) of `block`, without those it has not run."""
        return self._runs[block].state(start, stop)

    @property
    def num_blocks(self) -> int:
        return len(self._runs)

    @property
    def position_bytes(self) -> int:
        """The memory of a position that all blocks have run."""
        return self.num_bytes(self._partition, 1) - self.num_bytes(self._partition, 0)

    @property
    def token_ids(self) -> Int64:
        """The ids [n] int64 of the tokens; a view."""
        return self._token_ids[: self.num_tokens]

    def run(self, block: int, context: ChunkContext = nullcontext) -> ExitCandidates:
        """Run `block` over its backlog; return the exit's candidates for the newest position.

        Each chunk runs inside a `context()`: sequences that share a lock alternate even over long
        prompts.
        """
        while True:
            with context():
                self._run_chunk(block)
                if self._num_waiting(block) == 0:
                    stop = self._runs[block].filled
                    return self.exits(block, stop - 1, stop)[0]

    def fill(self, block: int, context: ChunkContext = nullcontext, num_last: int = 1) -> None:
        """Run `block` over its backlog, as :meth:`run` does, without its exit.

        The last `num_last` positions of the backlog are part of one chunk.
        """
        while self._num_waiting(block):
            with context():
                self._run_chunk(block, num_last)

    def exits(self, block: int, start: int, stop: int) -> list[ExitCandidates]:
        """Return the candidates of a block's exit for positions [start, stop).

        They must be among the last `MAX_EXITS` positions of the block's last chunk.
        """
        self._partition.work.head_calls += 1
        return self._lm_head(self._runs[block].exit_hidden_of(start, stop))

    def _num_waiting(self, block: int) -> int:
        available = self._runs[block - 1].filled if block else self.num_tokens
        return available - self._runs[block].filled

    def _run_chunk(self, block: int, num_last: int = 1) -> None:
        """Run the next chunk of `block`, if there is one. The last `num_last` positions of the
        backlog stay in one chunk.
        """
        waiting = self._num_waiting(block)
        start = self._runs[block].filled
        count = min(waiting, MAX_CHUNK, max(1, self._one_by_one_from - start))
        if count < waiting < count + num_last:
            count = waiting - num_last
        if count:
            self._runs[block](self._inputs(block, start, start + count))
            self._partition.work.positions[block] += count

    def _inputs(self, block: int, start: int, stop: int) -> Float32:
        """Return the inputs of `block`, [n, hidden] for positions [start, stop)."""
        if block:
            return self._runs[block - 1].hidden_states[start:stop]
        return self._partition.embed(self._token_ids[start:stop])

    def logits_of(self, block: int, position: int, token_ids: Int64 | None) -> Float32:
        """Return logits of an exit that has run; see :meth:`exits` and
        :meth:`LmHeadRun.logits_of`.
        """
        exit_hidden = self._runs[block].exit_hidden_of(position, position + 1)
        return self._lm_head.logits_of(exit_hidden[0], token_ids)

    def truncate(self, num_tokens: int) -> None:
        """Drop every position from `num_tokens` on, in every block; nothing is copied."""
        self.num_tokens = min(self.num_tokens, num_tokens)
        for run in self._runs:
            run.filled = min(run.filled, num_tokens)

    def num_filled(self, block: int) -> int:
        """Return the number n of positions [0, n) that `block` has run."""
        return self._runs[block].filled

    def hidden_states(self, block: int, start: int) -> Float32:
        """Return the outputs [n, hidden] float32 of `block` from position `start` on; a view."""
        run = self._runs[block]
        return run.hidden_states[start : run.filled]

    def caches(self, block: int) -> list[Float32]:
        """Return views of the layers' keys and values [kv_heads, filled, head_dim] float32.

        The last pair is the exit head's if that has a layer of its own.
        """
        return list(self.state(block, 0, self.num_filled(block)).caches)


class _BlockRun:
    """One block for one sequence. Arrays that stay in place are bound once; a step of one position
    binds none.
    """

    def __init__(self, session: ort.InferenceSession, capacity: int, num_exits: int) -> None:
        inputs = {value.name: value.shape for value in session.get_inputs()}
        hidden = inputs["input"][2]
        pasts = {name: shape for name, shape in inputs.items() if name.startswith(PAST)}
        self.filled = 0
        self.hidden_states = np.empty((capacity, hidden), np.float32)
        _, heads, _, head_dim = next(iter(pasts.values()))
        self.caches = np.zeros((len(pasts), 1, heads, capacity + SPARE, head_dim), np.float32)
        self._session = session
        self._exit_hidden = np.empty((num_exits, hidden), np.float32)
        self._exits_start = 0  # the position of the first row of `_exit_hidden`
        self._seqlens_k = np.zeros(1, np.int32)
        self._total_length = np.zeros((), np.int32)
        self._one_input = np.empty((1, 1, hidden), np.float32)
        self._one_output = np.empty((1, 1, hidden), np.float32)
        self._large_run = ort.RunOptions()
        self._large_run.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        self._chunk = self._bind(pasts)
        self._step = self._bind(pasts)
        bind_input(self._step, "input", self._one_input)
        bind_output(self._step, "hidden_states", self._one_output)
        bind_output(self._step, "exit_hidden", self._exit_hidden[:1])

    def _bind(self, pasts: dict[str, list[int]]) -> ort.IOBinding:
        binding = self._session.io_binding()
        for past, cache in zip(pasts, self.caches, strict=True):
            bind_input(binding, past, cache)
            bind_output(binding, past.replace(PAST, PRESENT, 1), cache)
        bind_input(binding, "seqlens_k", self._seqlens_k)
        bind_input(binding, "total_length", self._total_length)
        return binding

    def load(self, state: BlockState) -> None:
        """Copy the state of the next positions, as if they had run."""
        end = self.filled + len(state)
        self.hidden_states[self.filled : end] = state.hidden_states
        self.caches[:, 0, :, self.filled : end] = state.caches
        self.filled = end

    def state(self, start: int, stop: int) -> BlockState:
        """Return a view of positions [start, stop), without those that have not run."""
        end = min(stop, self.filled)
        return BlockState(self.hidden_states[start:end], self.caches[:, 0, :, start:end])

    def exit_hidden_of(self, start: int, stop: int) -> Float32:
        """Return the exit's rows of positions [start, stop) of the last run."""
        return self._exit_hidden[start - self._exits_start : stop - self._exits_start]

    def __call__(self, hidden_states: Float32) -> None:
        """Run over the next positions, [n, hidden]; keep the exits of the last ones."""
        count = len(hidden_states)
        end = self.filled + count
        self._seqlens_k[0] = end - 1
        self._total_length[()] = end
        if count == 1:
            self._one_input[0] = hidden_states
            self._session.run_with_iobinding(self._step)
            self.hidden_states[self.filled] = self._one_output[0, 0]
            self._exits_start = self.filled
        else:
            self._run_chunk(hidden_states, self.hidden_states[self.filled : end])
        self.filled = end

    def _run_chunk(self, hidden_states: Float32, outputs: Float32) -> None:
        count = len(hidden_states)
        options = self._large_run if count >= LARGE_CHUNK else None
        num_kept = len(self._exit_hidden)
        is_kept = count <= num_kept
        rows = self._exit_hidden
        if not is_kept and num_kept > 1:
            rows = np.empty((count, rows.shape[1]), np.float32)
        bind_input(self._chunk, "input", hidden_states[None])
        bind_output(self._chunk, "hidden_states", outputs[None])
        bind_output(self._chunk, "exit_hidden", rows[:count])
        self._session.run_with_iobinding(self._chunk, options)
        self._exits_start = self.filled
        if not is_kept:
            self._exit_hidden[:] = rows[-num_kept:]
            self._exits_start = self.filled + count - num_kept


def chunks_are_exact(partition: Partition) -> bool:
    """Return whether a chunk gives the same bits as single positions, on this machine.

    It is measured once for each partition. Graphs of earlier versions, those of the preset
    ``fp32`` and some processors do not give the same bits.
    """
    if partition.chunks_are_exact is None:
        trial = partition.move(partition.split)
        trial.work = WorkCounter([0] * len(partition.manifest.exits))
        chunk = _outputs(trial, [TRIAL[:2], TRIAL[2:]])
        steps = _outputs(trial, [TRIAL[:2], *([token_id] for token_id in TRIAL[2:])])
        partition.chunks_are_exact = np.array_equal(chunk, steps)
    return partition.chunks_are_exact


def _outputs(partition: Partition, chunks: Sequence[Sequence[int]]) -> Float32:
    """Return the outputs [n, hidden] of the deepest block."""
    cascade = Cascade(partition, len(TRIAL))
    for token_ids in chunks:
        cascade.append(token_ids)
        for block in range(len(partition.blocks)):
            cascade.fill(block)
    return cascade.hidden_states(len(partition.blocks) - 1, 0)
