"""The model's lower layers in ONNX Runtime: blocks between exits, and the LM head that all exits
share.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from edge_agent.config import Provider
from edge_agent.engine.ort_runtime import Runtime, load_session
from fleet.bundles.manifest import Bundle
from fleet.bundles.token_tables import Table, load_tables
from fleet.utils.memory_release import release_freed_memory

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]
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
    row of it and one for each candidate.
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
        self.blocks: list[ort.InferenceSession] = []
        self._load_blocks(split or self.manifest.exits[-1])
        release_freed_memory()

    def move(self, split: int) -> Self:
        """Return a partition with `split` layers, which shares its graphs with this one.

        Raises:
            BundleError: ONNX Runtime cannot load a graph.
        """
        moved = copy(self)
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

    def lm_head(self, exit_hidden: Float32) -> LmHeadRun:
        """Return the LM head, which reads `exit_hidden`, float32 [1, hidden], at each call."""
        return LmHeadRun(
            self._lm_head,
            self._table,
            exit_hidden,
            self.manifest.top_k,
            cap=self.manifest.model.logit_cap or None,
        )


class LmHeadRun:
    """The LM head for one sequence, bound once."""

    def __init__(
        self,
        session: ort.InferenceSession,
        table: Table,
        exit_hidden: Float32,
        top_k: int,
        *,
        cap: float | None = None,
    ) -> None:
        self._session = session
        self._table = table
        self._exit_hidden = exit_hidden
        self._cap = cap
        self._ids = np.empty((1, top_k), np.int64)
        self._logprobs = np.empty((1, top_k), np.float32)
        self._confidence = np.empty(1, np.float32)
        self._binding = session.io_binding()
        bind_input(self._binding, "table", table)
        bind_input(self._binding, "exit_hidden", exit_hidden)
        bind_output(self._binding, "top_ids", self._ids)
        bind_output(self._binding, "top_logprobs", self._logprobs)
        bind_output(self._binding, "confidence", self._confidence)

    def __call__(self) -> ExitCandidates:
        """Run the LM head and return the candidates."""
        self._session.run_with_iobinding(self._binding)
        return ExitCandidates(
            self._ids[0].copy(), self._logprobs[0].copy(), float(self._confidence[0])
        )

    def logits_of(self, token_ids: Int64 | None) -> Float32:
        """Return the logits [n] float32 of tokens [n], or of the whole vocabulary for None.

        They are those of the last run, by the exact weights that give the candidates' logits.
        """
        if token_ids is None:
            blocks = range(0, len(self._table), TABLE_ROWS)
            return np.concatenate([self._products(slice(i, i + TABLE_ROWS)) for i in blocks])
        return self._products(token_ids)

    def _products(self, rows: slice | Int64) -> Float32:
        logits: Float32 = self._table[rows].astype(np.float32) @ self._exit_hidden[0]
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
