"""Edge partition: ONNX graphs of the device's layers and of the LM head, with fused operators.

The layers run Hugging Face's own code, except for three parts. During a trace, attention becomes
``com.microsoft::GroupQueryAttention``, which applies the rotary embedding and updates the cache in
place, and the model's own rotary function becomes the identity. RMS norms become
``SimplifiedLayerNormalization``, in a copy of the layers.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.onnx import ops
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fleet.bundles.decoder_variants import (
    LOCAL,
    angle_arguments,
    bounded,
    layer_output,
    rotary_embeddings,
)
from fleet.bundles.manifest import ModelInfo
from fleet.errors import ExportError
from onnx_export.checkpoint import quiet_loggers
from onnx_export.heads import ExitHead, RmsNorm
from onnx_export.variants import (
    embedding_scale,
    is_rms_norm,
    norm_epsilon,
    norm_offset,
    scaled,
    state_scale,
)

ATTENTION = "onnx_group_query"
OPSET = 21
TRACED_CHUNK = 5
TRACED_CAPACITY = 64
CANDIDATES_PER_TOKEN = 2
"""Number of candidates that `LmHead` selects for each token that it returns. It selects them by a
coarse product, and computes their exact logits. So it also finds a token that the coarse product
ranks a little too low."""
GROUP_SIZE = 64
LOCAL_PREFIX = "local_"


@dataclass(kw_only=True)
class CacheInputs:
    """The tensors that fused attention uses besides query, key and value, for one traced block.

    Attention appends the updated cache of each layer, its keys and its values, to `present`.
    """

    first_layer: int
    past: tuple[Tensor, ...]
    seqlens_k: Tensor
    total_length: Tensor
    rotary: Mapping[str, Tensor]
    present: list[Tensor] = field(default_factory=list)

    def tables(self, window: int | None) -> tuple[Tensor, Tensor]:
        """Return cosines and sines of a layer with this window."""
        has_local = f"{LOCAL_PREFIX}cos" in self.rotary
        prefix = LOCAL_PREFIX if window is not None and has_local else ""
        return self.rotary[f"{prefix}cos"], self.rotary[f"{prefix}sin"]


def group_query_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: None,
    *,
    caches: CacheInputs,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend with ONNX Runtime's fused operator, which also applies the rotary embedding to query
    and key, and updates the cache.

    query [1, heads, s, d], key and value [1, kv_heads, s, d], unrotated -> [1, s, heads, d].
    A layer without rotary embedding (SmolLM3 has some) has a false `use_rope`.
    """
    batch, heads, length, dim = query.shape
    packed = [x.transpose(1, 2).reshape(batch, length, -1) for x in (query, key, value)]
    index = 2 * (module.layer_idx - caches.first_layer)
    past = caches.past[index : index + 2]
    tables = caches.tables(sliding_window)
    rotary = tables if getattr(module, "use_rope", True) else ()
    attributes: dict[str, Any] = {"num_heads": heads, "kv_num_heads": key.shape[1]}
    attributes |= {"scale": float(module.scaling), "do_rotary": int(bool(rotary))}
    if sliding_window is not None and sliding_window < len(tables[0]):
        attributes["local_window_size"] = sliding_window
    if softcap is not None:
        attributes["softcap"] = float(softcap)
    out, *present = ops.symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        (*packed, *past, caches.seqlens_k, caches.total_length, *rotary),
        attrs=attributes,
        dtypes=(query.dtype, *(tensor.dtype for tensor in past)),
        shapes=((batch, length, heads * dim), *(tensor.shape for tensor in past)),
        version=1,
    )
    caches.present += present
    return out.reshape(batch, length, heads, dim), None


class FusedRmsNorm(nn.Module):
    """An RMS norm as one node: x [..., hidden] -> [..., hidden].

    `offset` is added to the weight, which :mod:`onnx_export.fusion` does in the stored one.
    """

    def __init__(self, weight: Tensor, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.eps = eps
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        attributes: dict[str, Any] = {"axis": -1, "epsilon": self.eps, "stash_type": 1}
        weight = self.weight + self.offset if self.offset else self.weight
        return ops.symbolic(
            "SimplifiedLayerNormalization",
            (x, weight),
            attrs=attributes,
            dtype=x.dtype,
            shape=x.shape,
            version=1,
        )


def fuse_norms(module: nn.Module) -> None:
    """Replace every RMS norm below `module` by its fused form."""
    for name, child in module.named_children():
        if isinstance(child, RmsNorm):
            setattr(module, name, FusedRmsNorm(child.weight, child.eps))
        elif is_rms_norm(child):
            setattr(module, name, fused_norm(child))
        else:
            fuse_norms(child)


def fused_norm(norm: Any) -> FusedRmsNorm:
    """Return a Hugging Face RMS norm in its fused form."""
    return FusedRmsNorm(norm.weight, norm_epsilon(norm), norm_offset(norm))


def rotary_tables(model: Any, max_positions: int) -> dict[str, Tensor]:
    """Return the model's own cosines and sines, float32 [max_positions + 1, rotary_dim / 2] each.

    The last row, a copy, is for the further row of attention (:mod:`onnx_export.exact_chunks`).
    Those of its layers with a window have names that begin with `LOCAL_PREFIX` if they differ.
    """
    tables: dict[str, Tensor] = {}
    positions = torch.arange(max_positions)
    rows = torch.cat([positions, positions[-1:]])
    for kind, rotary in rotary_embeddings(model.model).items():
        prefix = LOCAL_PREFIX if kind == LOCAL else ""
        with torch.no_grad():
            angles = rotary(torch.zeros(1, 1), positions[None])
        for function, values in zip(("cos", "sin"), angles, strict=True):
            tables[prefix + function] = values[0, rows, : values.shape[-1] // 2]
    return tables


class Block(nn.Module):
    """Layers [start, stop), with the exit head at the end.

    If the head has a layer of its own, this layer runs over all positions of the block's output
    `hidden_states`, and uses the last pair of past keys and values. The first block's input is the
    embedding; the input of each other block is the output `hidden_states` of the block before it.

    forward: input float32 [1, s, hidden], seqlens_k int32 [1], total_length int32 scalar, past keys
    and values float32 [1, kv_heads, capacity, head_dim] ->
    hidden_states [1, s, hidden], exit_hidden [s, hidden], and the present keys and values.
    """

    def __init__(self, model: Any, start: int, stop: int, head: ExitHead, info: ModelInfo):
        super().__init__()
        self.start = start
        self.output_scale = 1 / state_scale(model.config)
        self.input_scale = (state_scale if start else embedding_scale)(model.config)
        self.layers = copy.deepcopy(model.model.layers[start:stop])
        self.head = copy.deepcopy(head)
        fuse_norms(self)
        config = copy.deepcopy(model.config)
        config._attn_implementation = ATTENTION
        for layer in (*self.layers, *own_layers(self.head)):
            layer.self_attn.config = config
        self.angles = rotary_embeddings(model.model).keys()
        tables = rotary_tables(model, info.max_positions)
        self.tables = tables.keys()
        for name, table in tables.items():
            self.register_buffer(name, table)

    def forward(
        self, hidden: Tensor, seqlens_k: Tensor, total_length: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        caches = CacheInputs(
            first_layer=self.start,
            past=past,
            seqlens_k=seqlens_k,
            total_length=total_length,
            rotary={name: getattr(self, name) for name in self.tables},
        )
        hidden = self._run(self.layers, scaled(hidden, self.input_scale), caches)
        exit_states = self._run(own_layers(self.head), hidden, caches)
        exit_hidden = self.head(exit_states[0])
        return scaled(hidden, self.output_scale), exit_hidden, *caches.present

    def _run(self, layers: Iterable[nn.Module], hidden: Tensor, caches: CacheInputs) -> Tensor:
        """Run decoder layers one after the other; the fused attention rotates."""
        unrotated = dict.fromkeys(self.angles, (None, None))
        for layer in layers:
            angles = angle_arguments(layer, unrotated)
            hidden = layer_output(layer(hidden, attention_mask=None, caches=caches, **angles))
        return hidden


def own_layers(head: ExitHead) -> list[nn.Module]:
    """Return the head's own decoder layer, if it has one."""
    return [] if head.layer is None else [head.layer]


class LmHead(nn.Module):
    """The LM head in two steps: a coarse product, which a later step quantises, selects candidates;
    then exact weights give their logits.

    The exact weights are the input `table`, so that a tied model stores them once, as its
    embedding. The softmax sum has exact terms for the candidates and coarse terms for all other
    tokens (docs/adr/0010).

    forward: exit_hidden [n, hidden], table [vocab, hidden] of any float type -> top_ids int64
    [n, k], top_logprobs float32 [n, k] best first, confidence [n].
    """

    def __init__(self, hidden: int, vocab: int, top_k: int, cap: float | None) -> None:
        super().__init__()
        self.lm_head = nn.Linear(hidden, vocab, bias=False, device="meta")
        self.top_k = top_k
        self.cap = cap
        self.num_candidates = min(CANDIDATES_PER_TOKEN * top_k, vocab)

    def forward(self, exit_hidden: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # For an input of three dimensions the exporter writes a MatMul, which a later step
        # quantises. For two dimensions the exporter would write a Gemm, which stays in float32.
        logits = bounded(self.lm_head(exit_hidden[None])[0], self.cap)
        ids = best_ids(logits, self.num_candidates)
        coarse = logits.gather(-1, ids)
        probabilities = logits.softmax(-1).gather(-1, ids)
        log_sum = coarse.amax(-1) - probabilities.amax(-1).log()
        weights = table.index_select(0, ids.flatten()).float()
        weights = weights.unflatten(0, ids.shape)
        exact = bounded((weights @ exit_hidden[..., None])[..., 0], self.cap) - log_sum[:, None]
        others = (1 - probabilities.sum(-1)).clamp(min=0)
        corrected_sum = others + exact.exp().sum(-1)
        top, order = (exact - corrected_sum.log()[:, None]).topk(self.top_k)
        return ids.gather(-1, order), top, top[:, 0].exp()


def best_ids(values: Tensor, k: int) -> Tensor:
    """Return the indices of the k largest numbers in each row of `values` [n, m]: int64 [n, k], in
    any order.

    The numbers form groups of `GROUP_SIZE`. The k groups with the largest maxima contain the k
    largest numbers. To find these groups first is much faster than a top-k over all m numbers.
    """
    if values.shape[1] % GROUP_SIZE or values.shape[1] <= k * GROUP_SIZE:
        return values.topk(k, sorted=False).indices
    groups = values.unflatten(-1, (-1, GROUP_SIZE))
    best = groups.amax(-1).topk(k, sorted=False).indices
    members = best[..., None] * GROUP_SIZE + torch.arange(GROUP_SIZE)
    members = members.flatten(-2)
    chosen = values.gather(-1, members).topk(k, sorted=False).indices
    return members.gather(-1, chosen)


@contextmanager
def fused_tracing(model: Any) -> Iterator[None]:
    """For the `with` block, disable rotary embedding in the model's Python module, and register
    the fused attention.
    """
    modeling: Any = sys.modules[type(model.model.layers[0].self_attn).__module__]
    rotary = modeling.apply_rotary_pos_emb
    modeling.apply_rotary_pos_emb = lambda q, k, *_args, **_kwargs: (q, k)
    ALL_ATTENTION_FUNCTIONS[ATTENTION] = group_query_attention
    try:
        yield
    finally:
        modeling.apply_rotary_pos_emb = rotary
        del ALL_ATTENTION_FUNCTIONS[ATTENTION]


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Silence the log lines and the known warnings of torch's exporter."""
    ignored = (
        (r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning),
        (r"# The axis name: capacity will not be used", UserWarning),
    )
    with quiet_loggers("torch.onnx", "onnxscript", "onnx_ir"), warnings.catch_warnings():
        for message, category in ignored:
            warnings.filterwarnings("ignore", message, category)
        yield


def export_block(
    model: Any, layers: tuple[int, int], head: ExitHead, info: ModelInfo
) -> onnx.ModelProto:
    """Return the layers [start, stop) with `head` as a graph, without weights.

    `layers` is the pair (start, stop).
    """
    start, stop = layers
    num_caches = stop - start + len(own_layers(head))
    caches = [f"{i}.{name}" for i in range(num_caches) for name in ("key", "value")]
    sequence = torch.export.Dim("sequence", min=1, max=info.max_positions)
    capacity = torch.export.Dim("capacity", min=1, max=info.max_positions)
    with fused_tracing(model):
        return trace_module(
            Block(model, start, stop, head, info),
            traced_inputs(info, len(caches)),
            inputs=["input", "seqlens_k", "total_length", *(f"past.{name}" for name in caches)],
            outputs=["hidden_states", "exit_hidden", *(f"present.{name}" for name in caches)],
            dynamic_shapes=({1: sequence}, {}, {}, *({2: capacity} for _ in caches)),
        )


def traced_inputs(info: ModelInfo, num_caches: int) -> tuple[Tensor, ...]:
    """Return example inputs of a `Block`; `num_caches` counts tensors of keys and of values."""
    cache_shape = (1, info.num_key_value_heads, TRACED_CAPACITY, info.head_dim)
    return (
        torch.zeros(1, TRACED_CHUNK, info.hidden_size),
        torch.tensor([TRACED_CHUNK - 1], dtype=torch.int32),
        torch.tensor(TRACED_CHUNK, dtype=torch.int32),
        *(torch.zeros(cache_shape) for _ in range(num_caches)),
    )


def export_lm_head(
    info: ModelInfo, top_k: int, table: torch.dtype, cap: float | None = None
) -> onnx.ModelProto:
    """Return the LM head with top-k, log-probabilities and confidence as a graph, without weights.

    `table` is the type of its exact weights; `cap` bounds the logits.
    """
    exit_hidden = torch.zeros(TRACED_CHUNK, info.hidden_size)
    rows = torch.export.Dim("rows", min=1, max=info.max_positions)
    weights = torch.zeros((), dtype=table).expand(info.vocab_size, info.hidden_size)
    return trace_module(
        LmHead(info.hidden_size, info.vocab_size, top_k, cap),
        (exit_hidden, weights),
        inputs=["exit_hidden", "table"],
        outputs=["top_ids", "top_logprobs", "confidence"],
        dynamic_shapes=({0: rows}, {}),
    )


class WithoutWeights(nn.Module):
    """A module that takes its weights as inputs, in the order of `state_dict()`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.call = partial(functional_call, module.eval())
        self.names = list(module.state_dict())

    def forward(self, weights: list[Tensor], *args: Tensor) -> Any:
        return self.call(dict(zip(self.names, weights, strict=True)), args)


def trace_module(
    module: nn.Module,
    args: tuple[Tensor, ...],
    *,
    inputs: list[str],
    outputs: list[str],
    dynamic_shapes: tuple[Any, ...] | None = None,
) -> onnx.ModelProto:
    """Return a module as a graph that does not depend on the machine that made it.

    The weights are float32 inputs of the graph, before its other inputs. So the module can be on
    the meta device, and the exporter can neither merge equal weights nor fold them into constants.
    """
    weights = {
        name: torch.zeros(()).expand(value.shape) for name, value in module.state_dict().items()
    }
    with quiet_exporter(), torch.no_grad():
        program = torch.onnx.export(
            WithoutWeights(module).eval(),
            (list(weights.values()), *args),
            input_names=[*weights, *inputs],
            output_names=outputs,
            dynamic_shapes=dynamic_shapes and ([{}] * len(weights), dynamic_shapes),
            dynamo=True,
            opset_version=OPSET,
            verbose=False,
        )
    if program is None:
        raise ExportError(
            "torch.onnx.export gave no graph; expected torch 2.13 with its dynamo exporter"
        )
    return without_metadata(program.model_proto)


def without_metadata(model: onnx.ModelProto) -> onnx.ModelProto:
    """Remove metadata and documentation from a model in place and return it."""
    graph = model.graph
    for message in (model, graph, *graph.node, *graph.value_info, *graph.input, *graph.output):
        message.ClearField("metadata_props")
        message.ClearField("doc_string")
    return model
