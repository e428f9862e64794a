"""The model's lower layers in ONNX Runtime: blocks between exits, and the LM head that all exits
share.
"""

from __future__ import annotations

import logging
from copy import copy
from dataclasses import dataclass
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from fleet.bundles.manifest import Bundle
from fleet.bundles.token_tables import Table, load_tables, release_table
from fleet.graphs.ort_runtime import Runtime, load_session
from fleet.protocol.types import Provider
from fleet.utils.memory_release import release_freed_memory

log = logging.getLogger(__name__)

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]
MAX_EXITS: Final = 32
"""The most positions of a run whose exits are kept."""
TABLE_ROWS: Final = 4096
"""Rows of the LM head's exact weights that are converted to float32 at a time."""


@dataclass(frozen=True)
class ExitCandidates:
    """An exit's candidates for the next token: ids [k] int64, log-probabilities [k] float32, best
    first.
    """

    token_ids: Int64
    logprobs: Float32
    confidence: float


@dataclass
class WorkCounter:
    """The work since the graphs were loaded, dropped positions included.

    `positions` are those of each block; `head_calls` are calls of the LM head.
    """

    positions: list[int]
    head_calls: int = 0


class Partition:
    """The graphs of a bundle up to a split, loaded once and shared by every sequence on the device.

    `split` is the number of layers, by default those of all exits. The embedding, also the LM
    head's exact weights if a model ties them, stays in its file, mapped into memory: a step reads a
    row of it and one for each candidate. `chunks_are_exact` is None before
    :func:`~fleet.graphs.cascade.chunks_are_exact` has measured it.
    """

    def __init__(
        self,
        bundle: Bundle,
        num_threads: int,
        provider: Provider = "auto",
        split: int | None = None,
    ) -> None:
        """Load the graphs.

        Raises:
            BundleError: ONNX Runtime cannot load a graph.
            ConfigError: ONNX Runtime lacks the provider.
        """
        self.manifest = bundle.manifest
        self._bundle = bundle
        self._runtime = Runtime(num_threads, provider)
        self._lm_head = self._load("edge/lm_head.onnx")
        self._embedding, self._table = load_tables(bundle)
        self.work = WorkCounter([0] * len(self.manifest.exits))
        self.chunks_are_exact: bool | None = None
        self.blocks: list[ort.InferenceSession] = []
        self._load_blocks(split or self.manifest.exits[-1])
        if not self.has_all_exits:
            log.info(
                "bundle %s was made by an earlier version: each step of this device gives one "
                "token; export the bundle again for several",
                self.manifest.bundle_id,
            )
        release_freed_memory()

    def move(self, split: int) -> Self:
        """Return a partition with `split` layers, which shares its graphs with this one.

        Raises:
            BundleError: ONNX Runtime cannot load a graph.
        """
        moved = copy(self)
        moved.chunks_are_exact = None
        moved._load_blocks(split)
        return moved

    def _load_blocks(self, split: int) -> None:
        """Keep or load the blocks below `split`."""
        self.split = split
        self.exits = tuple(layer for layer in self.manifest.exits if layer <= split)
        names = [f"edge/block_{i}.onnx" for i in range(len(self.exits))]
        loaded = self.blocks[: len(names)]
        self.blocks = loaded + [self._load(name) for name in names[len(loaded) :]]

    def _load(self, name: str) -> ort.InferenceSession:
        return load_session(self._bundle.path(name), self._runtime, self.manifest.tools)

    @property
    def is_whole(self) -> bool:
        """Whether the device holds the whole model, so that it needs no cloud."""
        return self.split == self.manifest.model.num_layers

    @property
    def has_all_exits(self) -> bool:
        """Whether the graphs give the exits of all positions of a chunk, not only of the last.

        Graphs of earlier versions do not.
        """
        values = [block.get_outputs()[1] for block in self.blocks] + self._lm_head.get_inputs()[:1]
        return all(value.shape[0] != 1 for value in values)

    @property
    def upload_layer(self) -> int:
        """The layer whose hidden states are uploaded."""
        return self.manifest.upload_layer_of(self.split)

    @property
    def num_token_ids(self) -> int:
        """The number of token ids that have an embedding; a tokenizer may know more."""
        return len(self._embedding)

    def embed(self, token_ids: Int64) -> Float32:
        """Return the embeddings float32 [n, hidden] of token_ids int64 [n]."""
        return self._embedding[token_ids].astype(np.float32)

    def release_tables(self) -> None:
        """Unmap the pages of the embedding and of the LM head's weights that were read.

        Linux maps 16 pages around each row, so that an answer maps nearly all.
        """
        release_table(self._embedding)
        release_table(self._table)

    def lm_head(self) -> LmHeadRun:
        """Return the LM head for one sequence."""
        return LmHeadRun(
            self._lm_head,
            self._table,
            self.manifest.top_k,
            max_rows=MAX_EXITS if self.has_all_exits else 1,
            cap=self.manifest.model.logit_cap or None,
        )


class LmHeadRun:
    """The LM head for one sequence, which binds again only what has moved."""

    def __init__(
        self,
        session: ort.InferenceSession,
        table: Table,
        top_k: int,
        *,
        max_rows: int = 1,
        cap: float | None = None,
    ) -> None:
        self._session = session
        self._table = table
        self._cap = cap
        self._ids = np.empty((max_rows, top_k), np.int64)
        self._logprobs = np.empty((max_rows, top_k), np.float32)
        self._confidences = np.empty(max_rows, np.float32)
        self._bound: tuple[int, int] | None = None
        self._binding = session.io_binding()
        bind_input(self._binding, "table", table)

    def __call__(self, exit_hidden: Float32) -> list[ExitCandidates]:
        """Run the LM head over exit_hidden [n, hidden]; return the candidates of each row."""
        count = len(exit_hidden)
        place = (exit_hidden.ctypes.data, count)
        if place != self._bound:
            self._bound = place
            bind_input(self._binding, "exit_hidden", exit_hidden)
            bind_output(self._binding, "top_ids", self._ids[:count])
            bind_output(self._binding, "top_logprobs", self._logprobs[:count])
            bind_output(self._binding, "confidence", self._confidences[:count])
        self._session.run_with_iobinding(self._binding)
        return [
            ExitCandidates(self._ids[i].copy(), self._logprobs[i].copy(), float(confidence))
            for i, confidence in enumerate(self._confidences[:count])
        ]

    def logits_of(self, exit_hidden: Float32, token_ids: Int64 | None) -> Float32:
        """Return the logits [n] float32 of tokens [n], or of the whole vocabulary for None.

        They are those of one row, exit_hidden [hidden], by the exact weights that give the
        candidates' logits.
        """
        if token_ids is None:
            blocks = range(0, len(self._table), TABLE_ROWS)
            pieces = [self._products(exit_hidden, slice(i, i + TABLE_ROWS)) for i in blocks]
            return np.concatenate(pieces)
        return self._products(exit_hidden, token_ids)

    def _products(self, exit_hidden: Float32, tokens: slice | Int64) -> Float32:
        logits: Float32 = self._table[tokens].astype(np.float32) @ exit_hidden
        return logits if self._cap is None else self._cap * np.tanh(logits / self._cap)


def bind_input(binding: ort.IOBinding, name: str, array: npt.NDArray[Any]) -> None:
    """Let `binding` read `array` in place; the caller keeps it alive."""
    binding.bind_input(
        name=name,
        device_type="cpu",
        device_id=0,
        element_type=array.dtype,
        shape=array.shape,
        buffer_ptr=array.ctypes.data,
    )


def bind_output(binding: ort.IOBinding, name: str, array: npt.NDArray[Any]) -> None:
    """Let `binding` write `array` in place; the caller keeps it alive."""
    binding.bind_output(
        name=name,
        device_type="cpu",
        device_id=0,
        element_type=array.dtype,
        shape=array.shape,
        buffer_ptr=array.ctypes.data,
    )
