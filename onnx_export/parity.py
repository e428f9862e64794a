"""Parity: the exported graphs against PyTorch on real text, before a bundle may be called one.

Each part is compared with PyTorch on the part's own input, so that an error shows where it is made; the whole edge is
compared from the tokens on. PyTorch in float32 is the edge without quantisation. Figures of an exit at layer L:

- ``hidden.L``: hidden states after the block, from the tokens on; largest distance, relative to the vector's length;
- ``steps.L``: the same block run step by step against run as one chunk;
- ``exit_hidden.L``: the exit head on the block's output; largest relative distance;
- ``logprob.L``: log-probabilities of head and LM head on the block's output; largest difference, in nats;
- ``top1.L``: how often their best token is PyTorch's;
- ``agreement.L``: how often the best token is that of the edge without quantisation, from the tokens on;

and ``lm_head.logprob`` and ``lm_head.top1`` of the LM head on its own. A best token counts as PyTorch's when PyTorch
gives it a log-probability within `TIE` of its own best one's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import Tensor

from fleet.bundles.manifest import ModelInfo
from fleet.errors import ExportError
from onnx_export.config import Quantization
from onnx_export.heads import ExitHead, HeadKind

Floats = NDArray[np.float32]
TEXT: Final = Path(__file__).parent / "data" / "parity.txt"
NUM_TOKENS: Final = 512
WINDOW: Final = 128
TIE: Final = 0.01
AT_LEAST: Final = ("top1", "agreement")
LIMITS: Final[Mapping[Quantization, Mapping[str, float]]] = {
    "fp32": {
        "hidden": 1e-4,
        "steps": 1e-4,
        "exit_hidden": 1e-4,
        "logprob": 1e-3,
        "top1": 1.0,
        "agreement": 1.0,
    },
    "int8": {
        "hidden": 0.25,
        "steps": 0.05,
        "exit_hidden": 1e-4,
        "logprob": 0.6,
        "top1": 0.9,
        "agreement": 0.85,
    },
    "balanced": {
        "hidden": 0.5,
        "steps": 0.1,
        "exit_hidden": 1e-4,
        "logprob": 0.6,
        "top1": 0.9,
        "agreement": 0.6,
    },
    "int4": {
        "hidden": 0.5,
        "steps": 0.1,
        "exit_hidden": 1e-4,
        "logprob": 0.6,
        "top1": 0.9,
        "agreement": 0.6,
    },
}
"""What was measured on the default model and on tiny random ones, with room for others (docs/adr/0008). An exit head is
float32 in every preset, but for a layer of its own."""

BLOCK_HEAD_LIMITS: Final[Mapping[Quantization, Mapping[str, float]]] = {
    "fp32": {},
    "int8": {"exit_hidden": 0.25, "logprob": 2.5},
    "balanced": {"exit_hidden": 0.5, "logprob": 2.5, "top1": 0.7},
    "int4": {"exit_hidden": 0.5, "logprob": 2.5, "top1": 0.7},
}
"""For a head with a layer of its own, which int8 changes as well: about twice what the default model's last layer gave
behind its layers 8 and 15."""


class BlockRunner:
    """One block's graph with a cache, run the plain way: no binding, a copy a call.

    ``run``: input float32 [1, s, hidden] -> hidden_states [1, s, hidden], exit_hidden [1, hidden].
    """

    def __init__(self, path: Path, info: ModelInfo, capacity: int) -> None:
        self.session = open_session(path)
        shape = (1, info.num_key_value_heads, capacity, info.head_dim)
        names = [
            value.name for value in self.session.get_inputs() if value.name.startswith("past.")
        ]
        self.cache = {name: np.zeros(shape, np.float32) for name in names}
        self.outputs = [
            "hidden_states",
            "exit_hidden",
            *(name.replace("past.", "present.", 1) for name in names),
        ]
        self.length = 0

    def run(self, x: NDArray[Any]) -> tuple[Floats, Floats]:
        self.length += x.shape[1]
        lengths = {
            "seqlens_k": np.array([self.length - 1], np.int32),
            "total_length": np.array(self.length, np.int32),
        }
        hidden, exit_hidden, *present = self.session.run(
            self.outputs, {"input": x, **lengths, **self.cache}
        )
        self.cache = dict(zip(self.cache, present, strict=True))
        return hidden, exit_hidden

    def step(self, x: NDArray[Any]) -> tuple[Floats, Floats]:
        """One position after the other from the start: hidden_states [1, s, hidden], exit_hidden [s, hidden]."""
        self.length = 0
        hidden, exits = zip(*(self.run(x[:, i : i + 1]) for i in range(x.shape[1])), strict=True)
        return np.concatenate(hidden, 1), np.concatenate(exits)


def open_session(path: Path) -> ort.InferenceSession:
    """A session on one thread of the CPU, so that the figures do not depend on how many there are."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@contextmanager
def one_thread() -> Iterator[None]:
    """While it lasts, PyTorch uses one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def relative_error(actual: Floats, expected: Floats) -> float:
    """Largest distance over positions, relative to the expected vector's length. Arrays [..., hidden]."""
    distance = np.linalg.norm(actual - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    return float(distance.max())


def text_windows(tokenizer: Any, max_positions: int) -> list[NDArray[np.int64]]:
    """`NUM_TOKENS` tokens of our text as sequences of their own, each int64 [1, up to 128]."""
    ids = tokenizer(TEXT.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)[
        "input_ids"
    ]
    tokens = np.resize(np.array(ids, np.int64), NUM_TOKENS)
    width = min(WINDOW, max_positions)
    return [tokens[None, start : start + width] for start in range(0, NUM_TOKENS, width)]


def run_head(model: Any, head: ExitHead, hidden_states: Tensor) -> Tensor:
    """PyTorch's exit head on hidden_states float32 [1, s, hidden] from position 0 on: exit_hidden [s, hidden]."""
    if head.layer is not None:
        length = hidden_states.shape[1]
        position = model.model.rotary_emb(hidden_states, torch.arange(length)[None])
        mask = torch.full((1, 1, length, length), torch.finfo(torch.float32).min).triu(1)
        hidden_states = head.layer(hidden_states, attention_mask=mask, position_embeddings=position)
    out: Tensor = head(hidden_states)[0]
    return out


def embed(edge: Path, token_ids: NDArray[np.int64]) -> Floats:
    """token_ids int64 [1, s] -> float32 [1, s, hidden], by the embedding in `edge`."""
    rows: Floats = np.load(edge / "embedding.npy", mmap_mode="r")[token_ids].astype(np.float32)
    return rows


class LmHeadGraph:
    """The LM head's graph: exit_hidden [s, hidden] -> top_ids int64 [s, k], top_logprobs float32 [s, k]."""

    def __init__(self, edge: Path) -> None:
        self.session = open_session(edge / "lm_head.onnx")
        own = edge / "lm_head.npy"
        self.table = np.load(own if own.exists() else edge / "embedding.npy")

    def run(self, exit_hidden: Floats) -> tuple[NDArray[np.int64], Floats]:
        outputs = ["top_ids", "top_logprobs"]
        rows = [
            self.session.run(outputs, {"exit_hidden": row[None], "table": self.table})
            for row in exit_hidden
        ]
        return np.concatenate([ids for ids, _ in rows]), np.concatenate(
            [logprobs for _, logprobs in rows]
        )


@dataclass
class Figures:
    """Figures by name over all windows: the worst distance, the mean of shares."""

    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, value: float) -> None:
        self.values.setdefault(name, []).append(value)

    def candidates(
        self, name: str, top_ids: NDArray[np.int64], logprobs: Floats, expected: Floats
    ) -> None:
        """Log-probabilities [s, k] and best tokens of a graph against PyTorch's log-probabilities [s, vocab].

        They are compared token by token and rank by rank, so that a token which the graph never offers shows as well.
        """
        ranked = torch.from_numpy(expected).topk(logprobs.shape[1]).values.numpy()
        difference = np.abs(
            np.stack([np.take_along_axis(expected, top_ids, -1), ranked]) - logprobs
        )
        self.add(name.format("logprob"), float(difference.max()))
        self.add(name.format("top1"), share_of_best(top_ids, expected))

    def result(self) -> dict[str, float]:
        """Each figure with three significant digits."""
        merged = {
            name: float(np.mean(values) if figure_kind(name) in AT_LEAST else np.max(values))
            for name, values in self.values.items()
        }
        return {name: float(f"{value:.3g}") for name, value in merged.items()}


def share_of_best(top_ids: NDArray[np.int64], logprobs: Floats) -> float:
    """How often the first of top_ids [s, k] is a best token of logprobs [s, vocab]."""
    chosen = np.take_along_axis(logprobs, top_ids[:, :1], -1)[:, 0]
    return float(np.mean(logprobs.max(-1) - chosen <= TIE))


def figure_kind(name: str) -> str:
    """``hidden`` of ``hidden.8``, ``top1`` of ``lm_head.top1``."""
    return next(part for part in name.split(".") if part in LIMITS["fp32"])


def measure(
    edge: Path,
    model: Any,
    heads: Mapping[int, ExitHead],
    info: ModelInfo,
    windows: list[NDArray[np.int64]],
) -> dict[str, float]:
    """The figures of the graphs in `edge` on token ids, each window int64 [1, s] a sequence of its own."""
    layers = sorted(heads)
    capacity = max(window.shape[1] for window in windows)
    blocks = [BlockRunner(edge / f"block_{i}.onnx", info, capacity) for i in range(len(layers))]
    lm_head = LmHeadGraph(edge)
    figures = Figures()
    with torch.no_grad(), one_thread():
        for window in windows:
            states = lower_layers(model, window, layers)
            x: Floats = embed(edge, window)
            for block, layer in zip(blocks, layers, strict=True):
                block.length = 0
                chunk = block.run(x)[0]
                x, exit_hidden = block.step(x)
                top_ids, logprobs = lm_head.run(exit_hidden)
                own = run_head(model, heads[layer], torch.from_numpy(x))
                whole = run_head(model, heads[layer], states[layer])
                figures.add(f"hidden.{layer}", relative_error(x, states[layer].numpy()))
                figures.add(f"steps.{layer}", relative_error(x, chunk))
                figures.add(f"exit_hidden.{layer}", relative_error(exit_hidden, own.numpy()))
                figures.candidates(f"{{}}.{layer}", top_ids, logprobs, exact_logprobs(model, own))
                figures.add(
                    f"agreement.{layer}", share_of_best(top_ids, exact_logprobs(model, whole))
                )
            figures.candidates(
                "lm_head.{}", *lm_head.run(whole.numpy()), exact_logprobs(model, whole)
            )
    return figures.result()


def lower_layers(model: Any, window: NDArray[np.int64], layers: list[int]) -> dict[int, Tensor]:
    """PyTorch's hidden states float32 [1, s, hidden] after each of `layers` layers, which must not be the last."""
    states = model.model(
        torch.from_numpy(window), output_hidden_states=True, use_cache=False
    ).hidden_states
    return {layer: states[layer] for layer in layers}


def exact_logprobs(model: Any, exit_hidden: Tensor) -> Floats:
    """PyTorch's log-probabilities [s, vocab] of exit_hidden [s, hidden]."""
    logprobs: Floats = model.lm_head(exit_hidden).log_softmax(-1).numpy()
    return logprobs


def limits(preset: Quantization, exit_head: HeadKind) -> Mapping[str, float]:
    """What each kind of figure has to keep."""
    return {**LIMITS[preset], **(BLOCK_HEAD_LIMITS[preset] if exit_head == "block" else {})}


def check(figures: Mapping[str, float], limits: Mapping[str, float]) -> None:
    """Raises ExportError naming the figures that do not keep their limits."""
    bad = [name for name in figures if not within(name, figures[name], limits)]
    if bad:
        listed = "; ".join(
            f"{name} is {figures[name]:.2g}, expected {limit_text(name, limits)}" for name in bad
        )
        raise ExportError(
            f"the exported graphs differ from PyTorch: {listed}; "
            "check the model and its exit heads, or try another --quantization"
        )


def within(name: str, value: float, limits: Mapping[str, float]) -> bool:
    """Whether a figure keeps its limit; no number keeps none."""
    kind = figure_kind(name)
    return value >= limits[kind] if kind in AT_LEAST else value <= limits[kind]


def limit_text(name: str, limits: Mapping[str, float]) -> str:
    """For example ``at most 0.0001``."""
    kind = figure_kind(name)
    return f"at {'least' if kind in AT_LEAST else 'most'} {limits[kind]:.3g}"
