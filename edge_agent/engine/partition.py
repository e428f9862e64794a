"""The model's lower layers in ONNX Runtime: blocks between exits, and the LM head that all exits
share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
    """The graphs of a bundle, loaded once and shared by every sequence on the device.

    The embedding, also the LM head's exact weights if a model ties them, stays in its file, mapped
    into memory: a step reads a row of it and one for each candidate.
    """

    def __init__(self, bundle: Bundle, num_threads: int, provider: Provider = "auto") -> None:
        """Load the graphs.

        Raises:
            BundleError: ONNX Runtime cannot load a graph.
            ConfigError: ONNX Runtime lacks the provider.
        """
        runtime = Runtime(num_threads, provider)
        self.manifest = bundle.manifest
        tools = bundle.manifest.tools
        self.blocks = [
            load_session(bundle.path(f"edge/block_{i}.onnx"), runtime, tools)
            for i in range(len(bundle.manifest.exits))
        ]
        self._lm_head = load_session(bundle.path("edge/lm_head.onnx"), runtime, tools)
        self.work = WorkCounter([0] * len(self.blocks))
        self._embedding, self._table = load_tables(bundle)
        release_freed_memory()

    @property
    def num_token_ids(self) -> int:
        """The number of token ids that have an embedding; a tokenizer may know more."""
        return len(self._embedding)

    def embed(self, token_ids: Int64) -> Float32:
        """Return the embeddings float32 [n, hidden] of token_ids int64 [n]."""
        return self._embedding[token_ids].astype(np.float32)

    def lm_head(self, exit_hidden: Float32) -> LmHeadRun:
        """Return the LM head, which reads `exit_hidden`, float32 [1, hidden], at each call."""
        return LmHeadRun(self._lm_head, self._table, exit_hidden, self.manifest.top_k)


class LmHeadRun:
    """The LM head for one sequence, bound once."""

    def __init__(
        self, session: ort.InferenceSession, table: Table, exit_hidden: Float32, top_k: int
    ) -> None:
        self._session = session
        self._ids = np.empty((1, top_k), np.int64)
        self._logprobs = np.empty((1, top_k), np.float32)
        self._confidence = np.empty(1, np.float32)
        self._binding = session.io_binding()
        self._borrowed = table, exit_hidden  # a binding keeps no array alive
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
