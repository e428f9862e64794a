"""Parity of the exported graphs with PyTorch on real text. A bundle must stay within the limits.

Each component is compared with PyTorch on the same input, so that a figure shows which component
is wrong. The figures ``hidden`` and ``same_as_pytorch`` are of all layers and heads together, from
the tokens on. PyTorch runs the model in float32, without quantisation. No figure measures the
quality of an exit: PyTorch runs the same head. Figures of an exit at layer L:

- ``hidden.L``: the largest distance of the hidden states after the block, relative to the length of
  the vector;
- ``steps.L``: the same distance between a run step by step and a run as one chunk;
- ``exit_hidden.L``: the largest relative distance of the exit head's output;
- ``logprob.L``: the largest difference of the log-probabilities, in nats;
- ``top1.L``: the share of positions where graph and PyTorch choose the same token for the same
  hidden states of the block;
- ``same_as_pytorch.L``: the share of positions where they choose the same token for the same text.

``same_as_pytorch.whole`` is that share for the whole model: the blocks up to the upload layer, then
PyTorch's layers. ``bits`` are those of a weight in the blocks, with its share of scales.

``lm_head.logprob`` and ``lm_head.top1`` are the figures of the LM head alone. Two tokens count as
the same if their log-probabilities in PyTorch differ by at most `TIE`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import Tensor

from fleet.bundles.decoder_variants import (
    angle_arguments,
    bounded,
    layer_output,
    rotate_positions,
)
from fleet.bundles.manifest import ModelInfo
from fleet.errors import ExportError
from onnx_export.config import Quantization
from onnx_export.heads import ExitHead, HeadKind
from onnx_export.quantize import product_weights
from onnx_export.streamed_model import StreamedModel
from onnx_export.tokenizer import start_ids
from onnx_export.variants import (
    attention_mask,
    attention_window,
    embedding_scale,
    logit_cap,
    state_scale,
)
from onnx_export.weights import EMBEDDING

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]
TEXT: Final = Path(__file__).parent / "data" / "parity.txt"
NUM_TOKENS: Final = 512
WINDOW: Final = 128
TIE: Final = 0.01
LM_HEAD_ROWS: Final = 4096
AT_LEAST: Final = ("top1", "same_as_pytorch")
BITS: Final = "bits"
WHOLE: Final = "same_as_pytorch.whole"
LEAST_AGREEMENT: Final = 0.95
"""Share of tokens that ``balanced`` has to keep at the deepest exit and in the whole model. Of 512
tokens, it has a standard error of 0.01."""
LIMITS: Final[Mapping[Quantization, Mapping[str, float]]] = {
    "fp32": {
        "hidden": 1e-4,
        "steps": 1e-4,
        "exit_hidden": 1e-4,
        "logprob": 1e-3,
        "top1": 1.0,
        "same_as_pytorch": 1.0,
    },
    "int8": {
        "hidden": 0.25,
        "steps": 0.25,
        "exit_hidden": 1e-4,
        "logprob": 0.6,
        "top1": 0.9,
        "same_as_pytorch": 0.85,
    },
    "balanced": {
        "hidden": 0.5,
        "steps": 0.25,
        "exit_hidden": 1e-4,
        "logprob": 0.6,
        "top1": 0.9,
        "same_as_pytorch": 0.6,
    },
    "int4": {
        "hidden": 0.5,
        "steps": 0.25,
        "exit_hidden": 1e-4,
        "logprob": 0.6,
        "top1": 0.9,
        "same_as_pytorch": 0.6,
    },
}
"""Limits at about twice the worst figures of the default model, with its own weights and with
weights on no grid, and of tiny random models (docs/adr/0008, 0041). An exit head is float32 in each
preset. A head of the kind `block` contains a layer, which is quantised."""

BLOCK_HEAD_LIMITS: Final[Mapping[Quantization, Mapping[str, float]]] = {
    "fp32": {},
    "int8": {"exit_hidden": 0.25, "logprob": 2.5},
    "balanced": {"exit_hidden": 0.5, "logprob": 2.5, "top1": 0.7},
    "int4": {"exit_hidden": 0.5, "logprob": 2.5, "top1": 0.7},
}
"""Limits for a head that contains a layer: about twice the figures of heads that were made of the
default model's last layer, after its layers 8 and 15."""


class BlockRunner:
    """One block's graph with a cache, run without I/O binding: each call copies.

    ``run``: input float32 [1, s, hidden] -> hidden_states [1, s, hidden], exit_hidden [s, hidden].
    """

    def __init__(self, path: Path, info: ModelInfo, capacity: int) -> None:
        self.session = open_onnx_session(path)
        shape = (1, info.num_key_value_heads, capacity + 1, info.head_dim)
        inputs = [value.name for value in self.session.get_inputs()]
        past = [name for name in inputs if name.startswith("past.")]
        present = [name.replace("past.", "present.", 1) for name in past]
        self.cache = {name: np.zeros(shape, np.float32) for name in past}
        self.outputs = ["hidden_states", "exit_hidden", *present]
        self.length = 0

    def run(self, x: NDArray[Any]) -> tuple[Floats, Floats]:
        self.length += x.shape[1]
        inputs = {
            "input": x,
            "seqlens_k": np.array([self.length - 1], np.int32),
            "total_length": np.array(self.length, np.int32),
        }
        hidden, exit_hidden, *present = self.session.run(self.outputs, inputs | self.cache)
        self.cache = dict(zip(self.cache, present, strict=True))
        return hidden, exit_hidden

    def step(self, x: NDArray[Any]) -> tuple[Floats, Floats]:
        """Run step by step from 0: hidden_states [1, s, hidden], exit_hidden [s, hidden]."""
        self.length = 0
        steps = [self.run(x[:, i : i + 1]) for i in range(x.shape[1])]
        hidden = [states for states, _ in steps]
        exit_hidden = [states for _, states in steps]
        return np.concatenate(hidden, 1), np.concatenate(exit_hidden)


def open_onnx_session(path: Path) -> ort.InferenceSession:
    """Open a session on one CPU thread. More threads would change the figures."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@contextmanager
def one_thread() -> Iterator[None]:
    """Let PyTorch use one thread."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def relative_error(actual: Floats, expected: Floats) -> float:
    """Return the largest distance of vectors [..., hidden], relative to the expected length."""
    distance = np.linalg.norm(actual - expected, axis=-1)
    length = np.linalg.norm(expected, axis=-1)
    return float((distance / length).max())


def text_windows(tokenizer: Any, max_positions: int) -> list[Ids]:
    """Return `NUM_TOKENS` tokens as separate sequences, int64 [1, up to 128] each.

    Each begins with the tokens that the tokenizer adds before a text: without them, the hidden
    states of models such as Gemma are unlike those of any prompt. Our text follows.
    """
    text = TEXT.read_text(encoding="utf-8")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    start = start_ids(tokenizer)
    width = min(WINDOW, max_positions)
    offsets = range(0, NUM_TOKENS, width)
    rows = np.resize(np.array(ids, np.int64), (len(offsets), width - len(start)))
    windows = [np.array([[*start, *row]], np.int64) for row in rows]
    return [
        window[:, : NUM_TOKENS - offset] for window, offset in zip(windows, offsets, strict=True)
    ]


def run_layer(decoder: Any, layer: Any, hidden_states: Tensor) -> Tensor:
    """Run PyTorch's layer on hidden_states float32 [1, s, hidden] from position 0 on."""
    length = hidden_states.shape[1]
    angles = rotate_positions(decoder, hidden_states, torch.arange(length)[None])
    mask = attention_mask(length, attention_window(layer.self_attn))
    arguments = angle_arguments(layer, angles)
    return layer_output(layer(hidden_states, attention_mask=mask, **arguments))


def run_model_layer(model: StreamedModel, layer: Any, hidden_states: Tensor) -> Tensor:
    """Run a layer of `model` on hidden_states float32 [1, s, hidden] from position 0 on."""
    return run_layer(model.skeleton.model, layer, hidden_states)


def embedded(model: StreamedModel, windows: list[Ids]) -> list[Tensor]:
    """Return PyTorch's input of the first layer, float32 [1, s, hidden], for each window."""
    embedding = model.read(EMBEDDING)
    scale = embedding_scale(model.config)
    return [embedding[torch.from_numpy(window)].float() * scale for window in windows]


def run_head(model: StreamedModel, head: ExitHead, hidden_states: Tensor) -> Tensor:
    """Run PyTorch's exit head on hidden_states float32 [1, s, hidden] from position 0 on.

    Return exit_hidden [s, hidden].
    """
    if head.layer is not None:
        hidden_states = run_layer(model.skeleton.model, head.layer, hidden_states)
    out: Tensor = head(hidden_states)[0]
    return out


def embed_tokens(edge: Path, token_ids: Ids) -> Floats:
    """Embed token_ids int64 [1, s] with the embedding in `edge`: float32 [1, s, hidden]."""
    embedding = np.load(edge / "embedding.npy", mmap_mode="r")
    rows: Floats = embedding[token_ids].astype(np.float32)
    return rows


class LmHeadGraph:
    """The LM head's graph: exit_hidden [s, hidden] -> top_ids int64 [s, k], top_logprobs float32
    [s, k]."""

    def __init__(self, edge: Path) -> None:
        self.session = open_onnx_session(edge / "lm_head.onnx")
        untied = edge / "lm_head.npy"
        path = untied if untied.exists() else edge / "embedding.npy"
        self.table = np.load(path, mmap_mode="r")

    def run(self, exit_hidden: Floats) -> tuple[Ids, Floats]:
        top_ids: list[Ids] = []
        top_logprobs: list[Floats] = []
        for row in exit_hidden:
            inputs = {"exit_hidden": row[None], "table": self.table}
            ids, logprobs = self.session.run(["top_ids", "top_logprobs"], inputs)
            top_ids.append(ids)
            top_logprobs.append(logprobs)
        return np.concatenate(top_ids), np.concatenate(top_logprobs)


@dataclass
class ParityFigures:
    """Figures by name: the largest distance and the mean share over all windows."""

    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, value: float) -> None:
        self.values.setdefault(name, []).append(value)

    def add_candidates(self, name: str, top_ids: Ids, logprobs: Floats, expected: Floats) -> None:
        """Compare a graph's candidates with PyTorch's log-probabilities [s, vocab].

        The candidates are `top_ids` and `logprobs`, both [s, k]. They are compared by token and by
        rank. The comparison by rank finds tokens that the graph should offer and does not. `name`
        has a placeholder for the kind of figure.
        """
        ranked = torch.from_numpy(expected).topk(logprobs.shape[1]).values.numpy()
        by_token = np.take_along_axis(expected, top_ids, -1)
        difference = np.abs(np.stack([by_token, ranked]) - logprobs)
        self.add(name.format("logprob"), float(difference.max()))
        self.add(name.format("top1"), share_of_best(top_ids, expected))

    def result(self) -> dict[str, float]:
        """Return each figure with three significant digits."""
        merged: dict[str, float] = {}
        for name, values in self.values.items():
            figure = np.mean(values) if figure_kind(name) in AT_LEAST else np.max(values)
            merged[name] = float(f"{float(figure):.3g}")
        return merged


def share_of_best(top_ids: Ids, logprobs: Floats) -> float:
    """Return the share of rows where the first of top_ids is a best token of logprobs.

    Shapes: top_ids [s, k], logprobs [s, vocab].
    """
    chosen = np.take_along_axis(logprobs, top_ids[:, :1], -1)[:, 0]
    is_best = logprobs.max(-1) - chosen <= TIE
    return float(np.mean(is_best))


def figure_kind(name: str) -> str:
    """Return a figure's kind: ``hidden`` for ``hidden.8``, ``top1`` for ``lm_head.top1``."""
    return next(word for word in name.split(".") if word in LIMITS["fp32"])


def measure_parity(
    edge: Path,
    model: StreamedModel,
    heads: Mapping[int, ExitHead],
    info: ModelInfo,
    windows: list[Ids],
    upload_layer: int,
) -> dict[str, float]:
    """Return the figures of the graphs in `edge`.

    Each window of token ids, int64 [1, s], is a sequence of its own. One of PyTorch's layers and
    one of the blocks are in memory at a time. The whole model goes on from `upload_layer`, an exit.
    """
    comparison = Comparison(model, LmHeadGraph(edge))
    layers = sorted(heads)
    capacity = max(ids.shape[1] for ids in windows)
    with torch.no_grad(), one_thread():
        states = lower_layers(model, windows, layers)
        inputs = [embed_tokens(edge, window) for window in windows]
        for i, layer in enumerate(layers):
            block = BlockRunner(edge / f"block_{i}.onnx", info, capacity)
            inputs = [
                comparison.add_block(block, heads[layer], f"{{}}.{layer}", x, state)
                for x, state in zip(inputs, states[layer], strict=True)
            ]
            del block
            if layer == upload_layer:
                uploaded = [torch.from_numpy(x) * state_scale(model.config) for x in inputs]
        for state in states[layers[-1]]:
            comparison.add_lm_head(run_head(model, heads[layers[-1]], state))
        comparison.add_whole(upload_layer, uploaded, states[upload_layer])
    paths = [edge / f"block_{i}.onnx" for i in range(len(layers))]
    return comparison.figures.result() | {BITS: mean_bits(paths)}


def mean_bits(paths: Iterable[Path]) -> float:
    """Return the mean bits of a weight in the products of graphs, with its share of scales."""
    num_bytes = 0
    num_weights = 0
    for path in paths:
        graph = onnx.load(path, load_external_data=False).graph
        tensors = {tensor.name: tensor for tensor in graph.initializer}
        for node in graph.node:
            if node.op_type == "MatMulNBits":
                num_bytes += sum(tensor_bytes(tensors[name]) for name in node.input[1:])
                num_weights += product_weights(node)
    return round(8 * num_bytes / num_weights, 2) if num_weights else 32.0


def tensor_bytes(tensor: onnx.TensorProto) -> int:
    """Return the bytes of a tensor's values."""
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return math.prod(tensor.dims) * dtype.itemsize


@dataclass
class Comparison:
    """The graphs of an edge, run next to the PyTorch model."""

    model: StreamedModel
    lm_head: LmHeadGraph
    figures: ParityFigures = field(default_factory=ParityFigures)

    def add_lm_head(self, exit_hidden: Tensor) -> None:
        """Add the LM head's figures for exit_hidden [s, hidden]."""
        self.figures.add_candidates(
            "lm_head.{}",
            *self.lm_head.run(exit_hidden.numpy()),
            exact_logprobs(self.model, exit_hidden),
        )

    def add_whole(self, layer: int, own: list[Tensor], states: list[Tensor]) -> None:
        """Add the share of equal tokens after the upper layers, which begin at `layer`.

        `own` and `states` are the hidden states there, of the graphs and of PyTorch.
        """
        outputs = upper_layers(self.model, layer, [*own, *states])
        norm = self.model.skeleton.model.norm
        logprobs = (exact_logprobs(self.model, norm(output)[0]) for output in outputs[: len(own)])
        for actual, state in zip(logprobs, outputs[len(own) :], strict=True):
            expected = exact_logprobs(self.model, norm(state)[0])
            self.figures.add(WHOLE, share_of_best(actual.argmax(-1)[:, None], expected))

    def add_block(
        self, block: BlockRunner, head: ExitHead, name: str, x: Floats, state: Tensor
    ) -> Floats:
        """Add one block's figures for one sequence x [1, s, hidden].

        `state` holds PyTorch's hidden states after the block; `name` has a placeholder for the kind
        of figure. Return the block's own hidden states.
        """
        block.length = 0
        chunk = block.run(x)[0]
        x, exit_hidden = block.step(x)
        check_float16_range(x, name.removeprefix("{}."))
        top_ids, logprobs = self.lm_head.run(exit_hidden)
        own_state = torch.from_numpy(x) * state_scale(self.model.config)
        own = run_head(self.model, head, own_state)
        whole = run_head(self.model, head, state)
        add = self.figures.add
        add(name.format("hidden"), relative_error(own_state.numpy(), state.numpy()))
        add(name.format("steps"), relative_error(x, chunk))
        add(name.format("exit_hidden"), relative_error(exit_hidden, own.numpy()))
        expected = exact_logprobs(self.model, own)
        self.figures.add_candidates(name, top_ids, logprobs, expected)
        share = share_of_best(top_ids, exact_logprobs(self.model, whole))
        add(name.format("same_as_pytorch"), share)
        return x


def check_float16_range(hidden_states: Floats, layer: str) -> None:
    """Raise ExportError unless float16, in which hidden states are uploaded, can hold them."""
    largest = float(np.abs(hidden_states).max())
    limit = float(np.finfo(np.float16).max)
    if largest > limit:
        raise ExportError(
            f"hidden states after layer {layer} reach {largest:.0f}, but they are uploaded in "
            f"float16, which ends at {limit:.0f}; choose an earlier exit"
        )


def lower_layers(
    model: StreamedModel, windows: list[Ids], layers: list[int]
) -> dict[int, list[Tensor]]:
    """Return PyTorch's hidden states float32 [1, s, hidden] after each of `layers` layers.

    The states are those of each window. Each of the model's layers is read once.
    """
    states = embedded(model, windows)
    kept: dict[int, list[Tensor]] = {}
    for number in range(layers[-1]):
        layer = model.layer(number)
        states = [run_model_layer(model, layer, state) for state in states]
        kept[number + 1] = states
    return {layer: kept[layer] for layer in layers}


def upper_layers(model: StreamedModel, first: int, states: list[Tensor]) -> list[Tensor]:
    """Return hidden states after the layers from `first` on. Each of them is read once."""
    for number in range(first, model.num_layers):
        layer = model.layer(number)
        states = [run_model_layer(model, layer, state) for state in states]
    return states


def exact_logprobs(model: StreamedModel, exit_hidden: Tensor) -> Floats:
    """Return PyTorch's log-probabilities [s, vocab] of exit_hidden [s, hidden]."""
    pieces = model.skeleton.lm_head.weight.split(LM_HEAD_ROWS)
    logits = torch.cat([exit_hidden @ rows.float().T for rows in pieces], -1)
    logprobs: Floats = bounded(logits, logit_cap(model.config)).log_softmax(-1).numpy()
    return logprobs


def parity_limits(
    preset: Quantization,
    exit_head: HeadKind,
    least_agreement: float = 1.0,
    deepest_exit: int | None = None,
) -> Mapping[str, float]:
    """Return the limit of each kind of figure, and of single figures by their name.

    A `least_agreement` lowers the limits of shares that are above it.
    """
    limits = dict(LIMITS[preset])
    if exit_head == "block":
        limits |= BLOCK_HEAD_LIMITS[preset]
    shares = {kind: limits[kind] for kind in AT_LEAST}
    if preset == "balanced":
        shares |= {WHOLE: LEAST_AGREEMENT, f"same_as_pytorch.{deepest_exit}": LEAST_AGREEMENT}
    return limits | {name: min(share, least_agreement) for name, share in shares.items()}


def check_parity(figures: Mapping[str, float], limits: Mapping[str, float]) -> None:
    """Raise ExportError with the names of the figures outside their limits."""
    violations = [
        f"{name} is {figures[name]:.2g}, expected {limit_text(name, limits)}"
        for name in outside_limits(figures, limits)
    ]
    if violations:
        raise ExportError(
            f"the exported graphs differ from PyTorch: {'; '.join(violations)}; "
            "check the model and its exit heads, try another --quantization, or accept a lower "
            "agreement with --accept"
        )


def outside_limits(figures: Mapping[str, float], limits: Mapping[str, float]) -> list[str]:
    """Return the names of the figures outside their limits."""
    return [name for name, value in figures.items() if not meets_limit(name, value, limits)]


def limit_of(name: str, limits: Mapping[str, float]) -> float:
    """Return a figure's limit: its own one, or that of its kind. ``bits`` have none."""
    if name == BITS:
        return math.inf
    return limits[name] if name in limits else limits[figure_kind(name)]


def meets_limit(name: str, value: float, limits: Mapping[str, float]) -> bool:
    """Return whether a figure is within its limit. NaN is not."""
    limit = limit_of(name, limits)
    return value <= limit if is_distance(name) else value >= limit


def limit_text(name: str, limits: Mapping[str, float]) -> str:
    """Return a figure's limit as text, for example ``at most 0.0001``."""
    limit = limit_of(name, limits)
    if name == BITS:
        return "none"
    return f"at {'most' if is_distance(name) else 'least'} {limit:.3g}"


def is_distance(name: str) -> bool:
    """Return whether a figure is best when it is small."""
    return name == BITS or figure_kind(name) not in AT_LEAST
