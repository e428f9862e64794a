"""Assembly of the edge's graphs: cached layers and LM head, with the exit heads appended."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto
from torch import Tensor, nn

from fleet.bundles.manifest import ModelInfo
from onnx_export.config import Quantization
from onnx_export.fusion import Graph, fuse_graph
from onnx_export.graph_cache import GraphCache, graph_key
from onnx_export.graph_weights import DataFile, Read
from onnx_export.heads import ExitHead
from onnx_export.partition import (
    TRACED_CHUNK,
    export_block,
    export_lm_head,
    fuse_norms,
    rotary_tables,
    trace_module,
)
from onnx_export.quantize import PREVIEW_BITS, quantize, quantize_preview
from onnx_export.streamed_model import StreamedModel
from onnx_export.variants import logit_cap
from onnx_export.weights import EMBEDDING


class IdentityHead(ExitHead):
    """A head that returns the hidden states unchanged."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__("shared", torch.ones(hidden_size), 0.0)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


class HeadGraph(nn.Module):
    """A head as a module to trace: block_output [s, hidden] -> exit_hidden [s, hidden]."""

    def __init__(self, head: ExitHead) -> None:
        super().__init__()
        self.head = copy.deepcopy(head)
        fuse_norms(self)

    def forward(self, block_output: Tensor) -> Tensor:
        # The exporter writes a Linear on two dimensions as a Gemm, which stays in float32.
        out: Tensor = self.head(block_output)
        return out


@dataclass(frozen=True)
class Assembly:
    """The writer of the quantised graphs of one model.

    Layers' weights named in `raised` have 8 bits, as then has the layer of an exit head.
    `preview_bits` are those of the LM head's first step.
    `traces` are the graphs of layers without weights, for a second writing with other bits.
    `write_block` and `write_lm_head` return whether the graph, except for the head, was in the
    cache.
    """

    model: StreamedModel
    info: ModelInfo
    quantization: Quantization
    cache: GraphCache
    raised: frozenset[str] = frozenset()
    preview_bits: int = PREVIEW_BITS
    traces: dict[tuple[int, int], bytes] = field(default_factory=dict)

    def write_block(self, layers: tuple[int, int], head: ExitHead, path: Path) -> bool:
        """Write layers [start, stop) with their exit head; a layer of the head is traced, too."""
        if head.layer is not None:
            graph, is_cached = self._layers(layers, head, path)
        else:
            graph, is_cached = self._layers(layers, IdentityHead(self.info.hidden_size), path)
            append_head(graph, self._head(head, data_file(path)))
        save_graph(graph, path)
        return is_cached

    def write_lm_head(self, top_k: int, path: Path) -> bool:
        """Write the LM head's graph."""
        cap = logit_cap(self.model.config)
        graph, is_cached = self._graph(
            path,
            {"lm_head.weight": in_memory(self.model.skeleton.lm_head.weight)},
            lambda: export_lm_head(self.info, top_k, self.table_dtype, cap),
            partial(quantize_preview, bits=self.preview_bits),
            part="lm_head",
            bits=self.preview_bits,
            top_k=top_k,
            table=self.table_dtype,
            cap=cap,
        )
        save_graph(graph, path)
        return is_cached

    @property
    def table_dtype(self) -> torch.dtype:
        """The type of the stored embedding and of the LM head's exact weights."""
        return torch.float32 if self.quantization == "fp32" else torch.float16

    def write_tables(self, folder: Path) -> None:
        """Write the embedding and, if it differs, the LM head's weights, [vocab, hidden]."""
        embedding = self.model.read(EMBEDDING)
        lm_head = self.model.skeleton.lm_head.weight
        np.save(folder / "embedding.npy", embedding.to(self.table_dtype).numpy())
        if not torch.equal(embedding, lm_head):
            del embedding
            np.save(folder / "lm_head.npy", lm_head.to(self.table_dtype).numpy())

    def _layers(
        self, layers: tuple[int, int], head: ExitHead, path: Path
    ) -> tuple[onnx.ModelProto, bool]:
        start, stop = layers
        skeleton = self.model.skeleton
        values = rotary_tables(skeleton, self.info.max_positions)
        state = {f"head.{name}": value for name, value in head.state_dict().items()}
        weights = {name: in_memory(value) for name, value in (values | state).items()}
        raised = set(state) if self.raised else set()
        for i in range(start, stop):
            for name, stored in self.model.layer_names(i).items():
                weights[f"layers.{i - start}.{name}"] = partial(self.model.read, stored)
                if stored in self.raised:
                    raised.add(f"layers.{i - start}.{name}")
        return self._graph(
            path,
            weights,
            lambda: self._trace(layers, head),
            lambda graph, preset: quantize(graph, preset, frozenset(raised)),
            part="block",
            raised=sorted(raised),
            config=self.model.config.to_json_string(use_diff=False),
            info=self.info,
            layers=layers,
        )

    def _trace(self, layers: tuple[int, int], head: ExitHead) -> onnx.ModelProto:
        if layers not in self.traces:
            graph = export_block(self.model.skeleton, layers, head, self.info)
            self.traces[layers] = graph.SerializeToString()
        return onnx.load_model_from_string(self.traces[layers])

    def _graph(
        self,
        path: Path,
        weights: Mapping[str, Read],
        trace: Callable[[], onnx.ModelProto],
        shrink: Callable[[Graph, Quantization], Graph],
        **options: object,
    ) -> tuple[onnx.ModelProto, bool]:
        """Return the graph of `trace` with weights, and whether the graph was in the cache."""
        data = data_file(path)
        key = graph_key(weights, preset=self.quantization, **options)

        def make() -> onnx.ModelProto:
            graph = fuse_graph(Graph(trace(), weights, data.store))
            return shrink(graph, self.quantization).to_model()

        return self.cache.get_or_make(key, make, data.path)

    def _head(self, head: ExitHead, data: DataFile) -> onnx.ModelProto:
        """Return the head's graph in float32: the cached graph of all heads of this shape, with
        the weights of this head.
        """
        state = head.state_dict()
        key = graph_key(
            {},
            part="head",
            kind=head.kind,
            eps=head.norm.eps,
            shapes=[(name, tuple(value.shape)) for name, value in state.items()],
        )
        model, _ = self.cache.get_or_make(key, lambda: trace_head(head))
        weights = {f"head.{name}": in_memory(value) for name, value in state.items()}
        return Graph(model, weights, data.store).to_model()


def in_memory(value: Tensor) -> Read:
    """Return a function that returns a weight in memory."""
    return lambda: value


def trace_head(head: ExitHead) -> onnx.ModelProto:
    """Return a graph for heads like `head`, without weights.

    block_output [s, hidden] -> exit_hidden [s, hidden].
    """
    sequence = torch.export.Dim("sequence", min=1)
    hidden_size = head.norm.weight.shape[0]
    return trace_module(
        HeadGraph(head),
        (torch.zeros(TRACED_CHUNK, hidden_size),),
        inputs=["block_output"],
        outputs=["exit_hidden"],
        dynamic_shapes=({0: sequence},),
    )


def append_head(body: onnx.ModelProto, head: onnx.ModelProto) -> None:
    """Append `head` (block_output -> exit_hidden) to `body`.

    The value ``exit_hidden`` of `body`, its hidden states, becomes the input of `head`.
    """
    rename_values(body, {"exit_hidden": "block_output"})
    internal = value_names(head) - {"block_output", "exit_hidden"}
    rename_values(head, {name: f"head/{name}" for name in internal})
    for node in head.graph.node:
        node.name = f"head/{node.name}"
    body.graph.node.extend(head.graph.node)
    body.graph.initializer.extend(head.graph.initializer)
    domains = {opset.domain for opset in body.opset_import}
    body.opset_import.extend(opset for opset in head.opset_import if opset.domain not in domains)


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


def data_file(path: Path) -> DataFile:
    """Return the file of the large weights of the graph at `path`."""
    return DataFile(path.with_name(f"{path.name}.data"))


def save_graph(graph: onnx.ModelProto, path: Path) -> None:
    """Write a graph whose large weights are in its data file."""
    for tensor in graph.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            entry = next(entry for entry in tensor.external_data if entry.key == "location")
            entry.value = data_file(path).path.name
    path.write_bytes(graph.SerializeToString(deterministic=True))
