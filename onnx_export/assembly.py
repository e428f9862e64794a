"""The edge's graphs out of parts: layers and LM head are kept for later exports, exit heads are put behind them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from fleet.bundles.manifest import ModelInfo
from onnx_export.config import Quantization
from onnx_export.graph_cache import PartCache, part_key
from onnx_export.heads import ExitHead
from onnx_export.partition import export_block, export_lm_head, fuse_norms, trace
from onnx_export.quantize import quantize, quantize_preview


class NoHead(ExitHead):
    """Gives the hidden states as they are."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__("shared", torch.ones(hidden_size), 0.0)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


class HeadGraph(nn.Module):
    """forward: last_hidden [1, hidden] -> exit_hidden [1, hidden]."""

    def __init__(self, head: ExitHead) -> None:
        super().__init__()
        self.head = copy.deepcopy(head)
        fuse_norms(self)

    def forward(self, last_hidden: Tensor) -> Tensor:
        out: Tensor = self.head(
            last_hidden
        )  # in two dimensions a Linear is a Gemm, which stays in float32
        return out


@dataclass(frozen=True)
class Assembly:
    """Makes the quantised graphs of one model; each method also says whether all but the head was there already."""

    model: Any
    info: ModelInfo
    quantization: Quantization
    parts: PartCache

    def block(self, layers: tuple[int, int], head: ExitHead) -> tuple[onnx.ModelProto, bool]:
        """Layers [start, stop) of `layers` with their exit head. A head with a layer of its own is traced with them."""
        own = (
            {}
            if head.layer is None
            else {f"head.{name}": value for name, value in head.state_dict().items()}
        )
        body, kept = self._layers(layers, head if own else NoHead(self.info.hidden_size), own)
        return (body if own else append_head(body, self._head(head))), kept

    def lm_head(self, top_k: int) -> tuple[onnx.ModelProto, bool]:
        """The LM head."""
        weight = self.model.lm_head.weight
        key = part_key({"lm_head": weight}, part="lm_head", top_k=top_k, table=self.table)
        return self.parts.get_or_make(
            key,
            lambda: quantize_preview(
                export_lm_head(self.model, self.info, top_k, self.table), self.quantization
            ),
        )

    @property
    def table(self) -> torch.dtype:
        """How the embedding and the LM head's exact weights are stored."""
        return torch.float32 if self.quantization == "fp32" else torch.float16

    def tables(self) -> dict[str, Tensor]:
        """The embedding, and the LM head's weights where they are not the same, [vocab, hidden] by name."""
        embedding = self.model.model.embed_tokens.weight
        lm_head = self.model.lm_head.weight
        named = {"embedding": embedding} | (
            {} if torch.equal(embedding, lm_head) else {"lm_head": lm_head}
        )
        return {name: weight.detach().to(self.table) for name, weight in named.items()}

    def _layers(
        self, layers: tuple[int, int], head: ExitHead, head_tensors: dict[str, Tensor]
    ) -> tuple[onnx.ModelProto, bool]:
        start, stop = layers
        tensors = dict(self.model.model.layers[start:stop].state_dict()) | head_tensors
        key = part_key(
            tensors,
            part=f"layers {layers}",
            config=self.model.config.to_json_string(use_diff=False),
            info=self.info,
            quantization=self.quantization,
        )
        return self.parts.get_or_make(
            key,
            lambda: quantize(export_block(self.model, layers, head, self.info), self.quantization),
        )

    def _head(self, head: ExitHead) -> onnx.ModelProto:
        """The head's graph, in float32: one of its shape with this head's weights."""
        weights = {f"head.{name}": value.numpy() for name, value in head.state_dict().items()}
        shapes = {name: weight.shape for name, weight in weights.items()}
        key = part_key(
            {}, part="head", kind=head.kind, eps=head.norm.eps, shapes=sorted(shapes.items())
        )
        graph, _ = self.parts.get_or_make(key, lambda: trace_head(head))
        for tensor in graph.graph.initializer:
            if tensor.name in weights:
                tensor.CopyFrom(numpy_helper.from_array(weights[tensor.name], tensor.name))
        return graph


def trace_head(head: ExitHead) -> onnx.ModelProto:
    """A graph for heads like `head`, last_hidden [1, hidden] -> exit_hidden [1, hidden]; its weights are random."""
    module = HeadGraph(head)
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():  # no two may be equal, or the exporter makes one of them
        parameter.data = torch.randn(parameter.shape, generator=generator)
    example = (torch.zeros(1, head.norm.weight.shape[0]),)
    return trace(
        module, example, inputs=["last_hidden"], outputs=["exit_hidden"], dynamic_shapes=None
    )


def append_head(body: onnx.ModelProto, head: onnx.ModelProto) -> onnx.ModelProto:
    """`body`, whose ``exit_hidden`` is the last hidden state, with `head` (last_hidden -> exit_hidden) behind it."""
    rename(body, {"exit_hidden": "last_hidden"})
    ours = {name for node in head.graph.node for name in (*node.input, *node.output) if name}
    ours |= {tensor.name for tensor in head.graph.initializer}
    rename(head, {name: f"head/{name}" for name in ours - {"last_hidden", "exit_hidden"}})
    for node in head.graph.node:
        node.name = f"head/{node.name}"
    body.graph.node.extend(head.graph.node)
    body.graph.initializer.extend(head.graph.initializer)
    known = {opset.domain for opset in body.opset_import}
    body.opset_import.extend(opset for opset in head.opset_import if opset.domain not in known)
    return body


def rename(graph: onnx.ModelProto, names: dict[str, str]) -> None:
    """Renames values of a graph's nodes and initialisers; inputs and outputs of the graph keep their names."""
    for node in graph.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for tensor in graph.graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
