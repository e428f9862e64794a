"""Parity: the exported graphs against PyTorch on a few tokens, before a bundle may be called one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray

from fleet.errors import ExportError
from fleet.manifest import ModelInfo
from onnx_export.config import Quantization
from onnx_export.heads import ExitHead

Floats = NDArray[np.float32]
NUM_POSITIONS: Final = 16
LIMITS: Final[Mapping[Quantization, float]] = {"fp32": 1e-4, "int8": 0.15}


class BlockRunner:
    """One block's graph with a cache, run the plain way: no binding, a copy a call.

    ``run``: input int64 [1, s] or float32 [1, s, hidden] -> hidden_states [1, s, hidden], exit_hidden [1, hidden].
    """

    def __init__(self, path: Path, info: ModelInfo, capacity: int) -> None:
        self.session = open_session(path)
        shape = (1, info.num_key_value_heads, capacity, info.head_dim)
        names = [value.name for value in self.session.get_inputs() if value.name.startswith("past.")]
        self.cache = {name: np.zeros(shape, np.float32) for name in names}
        self.length = 0

    def run(self, x: NDArray[Any]) -> tuple[Floats, Floats]:
        self.length += x.shape[1]
        lengths = {"seqlens_k": np.array([self.length - 1], np.int32), "total_length": np.array(self.length, np.int32)}
        hidden, exit_hidden, *present = self.session.run(None, {"input": x, **lengths, **self.cache})
        self.cache = dict(zip(self.cache, present, strict=True))
        return hidden, exit_hidden


def open_session(path: Path) -> ort.InferenceSession:
    """A session on the CPU that does not spin while it waits."""
    options = ort.SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def relative_error(actual: Floats, expected: Floats) -> float:
    """Largest distance over positions, relative to the expected vector's length. Arrays [..., hidden]."""
    distance = np.linalg.norm(actual - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    return float(distance.max())


def measure(edge: Path, model: Any, heads: Mapping[int, ExitHead], info: ModelInfo) -> dict[str, float]:
    """Errors of the graphs in `edge` on random tokens, run as one chunk and one step.

    ``hidden.<exit>`` is relative, over all positions; ``logprob.<exit>`` absolute, over the exit's best tokens.
    """
    ids = np.random.default_rng(0).integers(0, info.vocab_size, (1, NUM_POSITIONS))
    with torch.no_grad():
        expected = model.model(torch.from_numpy(ids), output_hidden_states=True, use_cache=False).hidden_states
    lm_head = open_session(edge / "lm_head.onnx")
    errors: dict[str, float] = {}
    chunks: list[NDArray[Any]] = [ids[:, :-1], ids[:, -1:]]
    for i, (layer, head) in enumerate(sorted(heads.items())):
        block = BlockRunner(edge / f"block_{i}.onnx", info, NUM_POSITIONS)
        results = [block.run(chunk) for chunk in chunks]
        chunks = [hidden for hidden, _ in results]
        errors[f"hidden.{layer}"] = relative_error(np.concatenate(chunks, 1), expected[layer].numpy())
        top_ids, logprobs, _ = lm_head.run(None, {"exit_hidden": results[-1][1]})
        with torch.no_grad():
            exact = model.lm_head(head(expected[layer][:, -1])).log_softmax(-1).numpy()
        errors[f"logprob.{layer}"] = float(np.abs(np.take_along_axis(exact, top_ids, -1) - logprobs).max())
    return errors


def check(errors: Mapping[str, float], preset: Quantization) -> None:
    """Raises ExportError when the graphs' hidden states are further from PyTorch's than the preset allows."""
    limit = LIMITS[preset]
    for name, error in errors.items():
        if name.startswith("hidden.") and not error <= limit:
            raise ExportError(
                f"the exported graphs differ from PyTorch: {name} has relative error {error:.2g}, "
                f"expected at most {limit:.2g} for {preset}; try another --quantization"
            )
