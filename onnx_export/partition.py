"""Edge partition: Hugging Face's own layers and LM head as ONNX graphs with fused attention, rotary and norms.

The layers run as they are. Three things are swapped while a graph is traced: attention becomes
``com.microsoft::GroupQueryAttention``, which rotates and keeps the cache in place; the model's own rotary function
becomes the identity; RMS norms become ``SimplifiedLayerNormalization``, on a copy of the layers.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.onnx import ops
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fleet.bundles.manifest import ModelInfo
from fleet.errors import ExportError
from onnx_export.checkpoint import quiet
from onnx_export.fusion import fuse
from onnx_export.heads import ExitHead, RmsNorm

ATTENTION = "onnx_group_query"
OPSET = 21
TRACED_CHUNK = 5
TRACED_CAPACITY = 64
CANDIDATES_PER_TOKEN = 2
"""Tokens with exact logits for each that is given, so that those which a coarse choice ranks too low are among them."""
GROUP_SIZE = 64


@dataclass(kw_only=True)
class CacheInputs:
    """What fused attention needs beside query, key and value while one block is traced."""

    first_layer: int
    past: tuple[Tensor, ...]
    seqlens_k: Tensor
    total_length: Tensor
    cos: Tensor
    sin: Tensor
    present: list[Tensor] = field(default_factory=list)


def group_query_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: None,
    *,
    cache: CacheInputs,
    **_: Any,
) -> tuple[Tensor, None]:
    """query [1, heads, s, d], key and value [1, kv_heads, s, d], unrotated -> [1, s, heads, d].

    A layer without rotary embedding (SmolLM3 has some) says so by its `use_rope`.
    """
    batch, heads, length, dim = query.shape
    q, k, v = (x.transpose(1, 2).reshape(batch, length, -1) for x in (query, key, value))
    index = 2 * (module.layer_idx - cache.first_layer)
    past_key, past_value = cache.past[index : index + 2]
    rotary = (cache.cos, cache.sin) if getattr(module, "use_rope", True) else ()
    out, *present = ops.symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        (q, k, v, past_key, past_value, cache.seqlens_k, cache.total_length, *rotary),
        attrs={
            "num_heads": heads,
            "kv_num_heads": key.shape[1],
            "scale": float(module.scaling),
            "do_rotary": int(bool(rotary)),
        },
        dtypes=(q.dtype, past_key.dtype, past_value.dtype),
        shapes=((batch, length, heads * dim), past_key.shape, past_value.shape),
        version=1,
    )
    cache.present += present
    return out.reshape(batch, length, heads, dim), None


class FusedRmsNorm(nn.Module):
    """x [..., hidden] -> [..., hidden] as one node."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        attributes: dict[str, Any] = {"axis": -1, "epsilon": self.eps, "stash_type": 1}
        return ops.symbolic(
            "SimplifiedLayerNormalization",
            (x, self.weight),
            attrs=attributes,
            dtype=x.dtype,
            shape=x.shape,
            version=1,
        )


def fuse_norms(module: nn.Module) -> None:
    """Replaces every RMS norm below `module` by its fused form."""
    for name, child in module.named_children():
        if isinstance(child, RmsNorm):
            setattr(module, name, FusedRmsNorm(child.weight, child.eps))
        elif type(child).__name__.endswith("RMSNorm"):
            setattr(module, name, fused(child))
        else:
            fuse_norms(child)


def fused(norm: Any) -> FusedRmsNorm:
    """A Hugging Face RMS norm in its fused form."""
    return FusedRmsNorm(norm.weight, float(norm.variance_epsilon))


def rotary_tables(model: Any, max_positions: int) -> tuple[Tensor, Tensor]:
    """The model's own cosines and sines, float32 [max_positions, head_dim / 2] each."""
    with torch.no_grad():
        cos, sin = model.model.rotary_emb(torch.zeros(1, 1), torch.arange(max_positions)[None])
    half = cos.shape[-1] // 2
    return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()


class Block(nn.Module):
    """Layers [start, stop), with the exit head at the end.

    A head's own layer, if it has one, runs over all positions with the last of the caches; `hidden_states` are what
    goes into it.

    forward: input float32 [1, s, hidden], seqlens_k int32 [1], total_length int32 scalar, past keys and values float32
    [1, kv_heads, capacity, head_dim] ->
    hidden_states [1, s, hidden], exit_hidden [1, hidden] of the last position, and the present keys and values.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, model: Any, start: int, stop: int, head: ExitHead, info: ModelInfo):
        super().__init__()
        self.start = start
        self.layers = copy.deepcopy(model.model.layers[start:stop])
        self.head = copy.deepcopy(head)
        fuse_norms(self)
        config = copy.deepcopy(model.config)
        config._attn_implementation = ATTENTION
        for layer in (*self.layers, *own_layers(self.head)):
            layer.self_attn.config = config
        cos, sin = rotary_tables(model, info.max_positions)
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)

    def forward(
        self, hidden: Tensor, seqlens_k: Tensor, total_length: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        cache = CacheInputs(
            first_layer=self.start,
            past=past,
            seqlens_k=seqlens_k,
            total_length=total_length,
            cos=self.cos,
            sin=self.sin,
        )
        given: dict[str, Any] = {
            "attention_mask": None,
            "position_embeddings": (None, None),
            "cache": cache,
        }
        for layer in self.layers:
            hidden = layer(hidden, **given)
        said = hidden
        for layer in own_layers(self.head):
            said = layer(said, **given)
        return hidden, self.head(said[:, -1]), *cache.present


def own_layers(head: ExitHead) -> list[nn.Module]:
    """The head's own decoder layer, if it has one."""
    return [] if head.layer is None else [head.layer]


class LmHead(nn.Module):
    """The LM head in two steps: a product that may be coarse chooses tokens, whose logits are then computed exactly.

    The exact weights are an input, so that a tied model keeps them once, as its embedding. What the chosen tokens'
    exact logits change is put right in the sum of all probabilities as well; only what the others have there stays as
    the coarse product gave it (docs/adr/0010).

    forward: exit_hidden [1, hidden], table [vocab, hidden] of any float type -> top_ids int64 [1, k], top_logprobs
    float32 [1, k] best first, confidence [1].
    """

    def __init__(self, weight: Tensor, top_k: int) -> None:
        super().__init__()
        self.lm_head = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.lm_head.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.top_k = top_k
        self.num_candidates = min(CANDIDATES_PER_TOKEN * top_k, weight.shape[0])

    def forward(self, exit_hidden: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.lm_head(exit_hidden[None])[
            0, 0
        ]  # in three dimensions it becomes a MatMul, which quantises
        ids = best_ids(logits, self.num_candidates)
        coarse = logits.index_select(0, ids)
        probabilities = logits.softmax(-1).index_select(0, ids)
        log_sum = coarse.amax(-1) - probabilities.amax(-1).log()
        exact = (exit_hidden @ table.index_select(0, ids).float().T)[0] - log_sum
        others = (1 - probabilities.sum()).clamp(min=0)
        top, order = (exact - (others + exact.exp().sum()).log()).topk(self.top_k)
        return ids.index_select(0, order)[None], top[None], top[:1].exp()


def best_ids(values: Tensor, k: int) -> Tensor:
    """Where the k largest of values [n] are, int64 [k] in any order.

    They lie in the k groups with the largest maxima, which are far quicker to find than they are.
    """
    if values.shape[0] % GROUP_SIZE or values.shape[0] <= k * GROUP_SIZE:
        return values.topk(k, sorted=False).indices
    groups = values.view(-1, GROUP_SIZE)
    best = groups.amax(-1).topk(k, sorted=False).indices
    chosen = groups.index_select(0, best).flatten().topk(k, sorted=False).indices
    group = chosen.div(GROUP_SIZE, rounding_mode="floor")
    return (best.index_select(0, group) - group) * GROUP_SIZE + chosen


@contextmanager
def fused_tracing(model: Any) -> Iterator[None]:
    """While it lasts, the model's module rotates nothing and its attention can be the fused one."""
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
    """Holds back what torch's exporter says of its own insides, warnings by their exact words."""
    with quiet("torch.onnx", "onnxscript", "onnx_ir"), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning
        )
        warnings.filterwarnings(
            "ignore", r"# The axis name: capacity will not be used", UserWarning
        )
        yield


def export_block(
    model: Any, layers: tuple[int, int], head: ExitHead, info: ModelInfo
) -> onnx.ModelProto:
    """Layers [start, stop) of `layers` as a graph."""
    start, stop = layers
    chunk = TRACED_CHUNK
    num_caches = stop - start + len(own_layers(head))
    x = torch.zeros(1, chunk, info.hidden_size)
    past = [
        torch.zeros(1, info.num_key_value_heads, TRACED_CAPACITY, info.head_dim)
        for _ in range(2 * num_caches)
    ]
    lengths = torch.tensor([chunk - 1], dtype=torch.int32), torch.tensor(chunk, dtype=torch.int32)
    sequence = torch.export.Dim("sequence", min=1, max=info.max_positions)
    capacity = torch.export.Dim("capacity", min=1, max=info.max_positions)
    caches = [f"{i}.{part}" for i in range(num_caches) for part in ("key", "value")]
    with fused_tracing(model):
        graph = trace(
            Block(model, start, stop, head, info),
            (x, *lengths, *past),
            inputs=["input", "seqlens_k", "total_length", *(f"past.{name}" for name in caches)],
            outputs=["hidden_states", "exit_hidden", *(f"present.{name}" for name in caches)],
            dynamic_shapes=({1: sequence}, None, None, tuple({2: capacity} for _ in past)),
        )
    return fuse(graph)


def export_lm_head(model: Any, info: ModelInfo, top_k: int, table: torch.dtype) -> onnx.ModelProto:
    """The model's LM head with top-k, log-probabilities and confidence; `table` is the type of its exact weights."""
    return trace(
        LmHead(model.lm_head.weight, top_k),
        (
            torch.zeros(1, info.hidden_size),
            torch.zeros(info.vocab_size, info.hidden_size, dtype=table),
        ),
        inputs=["exit_hidden", "table"],
        outputs=["top_ids", "top_logprobs", "confidence"],
        dynamic_shapes=None,
    )


def trace(
    module: nn.Module,
    args: tuple[Tensor, ...],
    *,
    inputs: list[str],
    outputs: list[str],
    dynamic_shapes: Any,
) -> onnx.ModelProto:
    """One module as a graph without traces of the machine that made it."""
    with quiet_exporter(), torch.no_grad():
        program = torch.onnx.export(
            module.eval(),
            args,
            input_names=inputs,
            output_names=outputs,
            dynamic_shapes=dynamic_shapes,
            dynamo=True,
            opset_version=OPSET,
            verbose=False,
        )
    if program is None:
        raise ExportError(
            "torch.onnx.export gave no graph; expected torch 2.13 with its dynamo exporter"
        )
    graph = program.model_proto
    for part in (
        graph,
        graph.graph,
        *graph.graph.node,
        *graph.graph.value_info,
        *graph.graph.input,
        *graph.graph.output,
    ):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    return graph
