"""Assembly of the edge's graphs: cached layers and LM head, with the exit heads appended."""

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
from onnx_export.graph_cache import GraphCache, graph_key
from onnx_export.heads import ExitHead
from onnx_export.partition import export_block, export_lm_head, fuse_norms, trace_module
from onnx_export.quantize import quantize, quantize_preview


class IdentityHead(ExitHead):
    """A head that returns the hidden states unchanged."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__("shared", torch.ones(hidden_size), 0.0)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


class HeadGraph(nn.Module):
    """A head as a module to trace: last_hidden [1, hidden] -> exit_hidden [1, hidden]."""

    def __init__(self, head: ExitHead) -> None:
        super().__init__()
        self.head = copy.deepcopy(head)
        fuse_norms(self)

    def forward(self, last_hidden: Tensor) -> Tensor:
        # In two dimensions a Linear is a Gemm, which stays in float32.
        out: Tensor = self.head(last_hidden)
        return out


@dataclass(frozen=True)
class Assembly:
    """The quantised graphs of one model.

    `block` and `lm_head` also return whether the graph, except for the head, was in the cache.
    """

    model: Any
    info: ModelInfo
    quantization: Quantization
    cache: GraphCache

    def block(self, layers: tuple[int, int], head: ExitHead) -> tuple[onnx.ModelProto, bool]:
        """Return layers [start, stop) with their exit head; its own layer is traced with them."""
        if head.layer is not None:
            head_tensors = {f"head.{name}": value for name, value in head.state_dict().items()}
            return self._layers(layers, head, head_tensors)
        body, cached = self._layers(layers, IdentityHead(self.info.hidden_size), {})
        return append_head(body, self._head(head)), cached

    def lm_head(self, top_k: int) -> tuple[onnx.ModelProto, bool]:
        """Return the LM head's graph."""
        weight = self.model.lm_head.weight
        key = graph_key(
            {"lm_head": weight},
            part="lm_head",
            top_k=top_k,
            table=self.table_dtype,
        )

        def make() -> onnx.ModelProto:
            graph = export_lm_head(self.model, self.info, top_k, self.table_dtype)
            return quantize_preview(graph, self.quantization)

        return self.cache.get_or_make(key, make)

    @property
    def table_dtype(self) -> torch.dtype:
        """The type of the stored embedding and of the LM head's exact weights."""
        return torch.float32 if self.quantization == "fp32" else torch.float16

    def tables(self) -> dict[str, Tensor]:
        """Return the embedding and, if it differs, the LM head's weights, [vocab, hidden]."""
        embedding = self.model.model.embed_tokens.weight
        lm_head = self.model.lm_head.weight
        weights = {"embedding": embedding}
        if not torch.equal(embedding, lm_head):
            weights["lm_head"] = lm_head
        return {name: weight.detach().to(self.table_dtype) for name, weight in weights.items()}

    def _layers(
        self, layers: tuple[int, int], head: ExitHead, head_tensors: dict[str, Tensor]
    ) -> tuple[onnx.ModelProto, bool]:
        start, stop = layers
        tensors = dict(self.model.model.layers[start:stop].state_dict())
        key = graph_key(
            tensors | head_tensors,
            part=f"layers {layers}",
            config=self.model.config.to_json_string(use_diff=False),
            info=self.info,
            quantization=self.quantization,
        )

        def make() -> onnx.ModelProto:
            graph = export_block(self.model, layers, head, self.info)
            return quantize(graph, self.quantization)

        return self.cache.get_or_make(key, make)

    def _head(self, head: ExitHead) -> onnx.ModelProto:
        """Return the head's graph in float32: a cached graph of its shape with its weights."""
        weights = {f"head.{name}": value.numpy() for name, value in head.state_dict().items()}
        shapes = {name: weight.shape for name, weight in weights.items()}
        key = graph_key(
            {},
            part="head",
            kind=head.kind,
            eps=head.norm.eps,
            shapes=sorted(shapes.items()),
        )
        graph, _ = self.cache.get_or_make(key, lambda: trace_head(head))
        for tensor in graph.graph.initializer:
            if tensor.name in weights:
                tensor.CopyFrom(numpy_helper.from_array(weights[tensor.name], tensor.name))
        return graph


def trace_head(head: ExitHead) -> onnx.ModelProto:
    """Return a graph for heads like `head`, with random weights.

    last_hidden [1, hidden] -> exit_hidden [1, hidden].
    """
    module = HeadGraph(head)
    generator = torch.Generator().manual_seed(0)
    # The exporter merges equal parameters, so no two may be equal.
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    hidden_size = head.norm.weight.shape[0]
    return trace_module(
        module,
        (torch.zeros(1, hidden_size),),
        inputs=["last_hidden"],
        outputs=["exit_hidden"],
        dynamic_shapes=None,
    )


def append_head(body: onnx.ModelProto, head: onnx.ModelProto) -> onnx.ModelProto:
    """Append `head` (last_hidden -> exit_hidden) to `body` and return `body`.

    The ``exit_hidden`` of `body` is the last hidden state.
    """
    rename_values(body, {"exit_hidden": "last_hidden"})
    internal = value_names(head) - {"last_hidden", "exit_hidden"}
    rename_values(head, {name: f"head/{name}" for name in internal})
    for node in head.graph.node:
        node.name = f"head/{node.name}"
    body.graph.node.extend(head.graph.node)
    body.graph.initializer.extend(head.graph.initializer)
    domains = {opset.domain for opset in body.opset_import}
    body.opset_import.extend(opset for opset in head.opset_import if opset.domain not in domains)
    return body


def value_names(model: onnx.ModelProto) -> set[str]:
    """Return the names of all values and initialisers of a graph."""
    names = {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        names.update(node.input)
        names.update(node.output)
    return names - {""}


def rename_values(model: onnx.ModelProto, names: dict[str, str]) -> None:
    """Rename values of a graph's nodes and initialisers; the graph's inputs and outputs stay."""
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for tensor in model.graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
