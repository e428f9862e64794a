"""The model's lower layers in ONNX Runtime: blocks between exits, and the LM head that all exits share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from edge_agent.config import Provider
from edge_agent.engine.ort_runtime import Runtime, load_session, release_freed_memory
from fleet.bundles.manifest import Bundle
from fleet.bundles.token_tables import Table, load_tables

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ExitCandidates:
    """What an exit says of the next token: ids [k] int64 and log-probabilities [k] float32, best first."""

    token_ids: Int64
    logprobs: Float32
    confidence: float


@dataclass
class WorkCounter:
    """What has run since the graphs were loaded, what was forgotten again included: `positions` of each block, and
    calls of the LM head."""

    positions: list[int]
    head_calls: int = 0


class Partition:
    """The graphs of a bundle, loaded once and shared by every sequence on the device.

    The embedding, which is the LM head's exact weights as well where a model ties them, stays in its file, mapped into
    memory: a step reads a row of it and one for each candidate.
    """

    def __init__(self, bundle: Bundle, num_threads: int, provider: Provider = "auto") -> None:
        """Raises BundleError when ONNX Runtime cannot load a graph, ConfigError when it lacks the provider."""
        runtime = Runtime(num_threads, provider)
        self.manifest = bundle.manifest
        names = [
            *(f"edge/block_{i}.onnx" for i in range(len(bundle.manifest.exits))),
            "edge/lm_head.onnx",
        ]
        *self.blocks, self._lm_head = [
            load_session(bundle.path(n), runtime, bundle.manifest.tools) for n in names
        ]
        self.work = WorkCounter([0] * len(self.blocks))
        self._embedding, self._table = load_tables(bundle)
        release_freed_memory()

    def embed(self, token_ids: Int64) -> Float32:
        """token_ids int64 [n] -> float32 [n, hidden]."""
        return self._embedding[token_ids].astype(np.float32)

    def lm_head(self, exit_hidden: Float32) -> LmHeadRun:
        """The LM head on whatever is in exit_hidden, float32 [1, hidden], at each call."""
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
        self._borrowed = table, exit_hidden  # a binding does not keep what it reads alive
        bind_input(self._binding, "table", table)
        bind_input(self._binding, "exit_hidden", exit_hidden)
        bind_output(self._binding, "top_ids", self._ids)
        bind_output(self._binding, "top_logprobs", self._logprobs)
        bind_output(self._binding, "confidence", self._confidence)

    def __call__(self) -> ExitCandidates:
        """Runs it."""
        self._session.run_with_iobinding(self._binding)
        return ExitCandidates(
            self._ids[0].copy(), self._logprobs[0].copy(), float(self._confidence[0])
        )


def bind_input(binding: ort.IOBinding, name: str, array: npt.NDArray[Any]) -> None:
    """Lets `binding` read `array` in place; the caller keeps it alive."""
    binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)


def bind_output(binding: ort.IOBinding, name: str, array: npt.NDArray[Any]) -> None:
    """Lets `binding` write `array` in place; the caller keeps it alive."""
    binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
