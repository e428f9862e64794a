"""Graph fusion: fewer nodes for the same result.

A step on a small device consists of many short operations. Products of one input by several
weights become one product, the three that feed an attention directly stay packed, a residual sum
and the norm after it become ``SkipSimplifiedLayerNormalization``, and reshapes that change nothing
are removed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper

from onnx_export.graph_weights import Array, Read, Store, Weight, inline

MICROSOFT = "com.microsoft"
ATTENTION = "GroupQueryAttention"
NORM = "SimplifiedLayerNormalization"


class Graph:
    """A model's nodes in order, with the producer and the readers of each value.

    `constants` are its initialisers, with their values. `weights` are read when they are needed.
    """

    def __init__(
        self, model: onnx.ModelProto, weights: Mapping[str, Read], store: Store = inline
    ) -> None:
        """Turn the inputs of `model` that `weights` names into weights; `store` makes initialisers
        of values.
        """
        self.model = model
        self.store = store
        inputs = model.graph.input
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.weights = {
            value.name: Weight(value_shape(value), (weights[value.name],), names=(value.name,))
            for value in inputs
            if value.name in weights
        }
        replace_elements(inputs, [value for value in inputs if value.name not in weights])
        self.outputs = {value.name for value in model.graph.output}
        self.nodes: list[NodeProto] = []
        self.replace_nodes(model.graph.node)

    def replace_nodes(self, nodes: Iterable[NodeProto]) -> None:
        """Replace the present nodes by `nodes`, which must be in an order in which they can run."""
        self.nodes = list(nodes)
        self.producers: dict[str, NodeProto] = {}
        self.readers: defaultdict[str, list[NodeProto]] = defaultdict(list)
        for node in self.nodes:
            for name in node.output:
                self.producers[name] = node
            for name in node.input:
                self.readers[name].append(node)
        self.producers.pop("", None)

    def without(self, removed: Iterable[NodeProto]) -> list[NodeProto]:
        """Return the nodes except `removed`."""
        ids = {id(node) for node in removed}
        return [node for node in self.nodes if id(node) not in ids]

    def add_constant(self, name: str, value: Array) -> str:
        """Store a value as an initialiser; return its name."""
        self.constants[name] = self.store(name, value)
        return name

    def number(self, name: str) -> float | None:
        """Return the value of a constant that is one number; None for other values."""
        tensor = self.constants.get(name)
        is_number = tensor is not None and not tensor.dims
        return float(numpy_helper.to_array(tensor)) if is_number else None

    def is_product(self, node: NodeProto) -> bool:
        """Return whether `node` multiplies by a weight."""
        return node.op_type == "MatMul" and node.input[1] in self.weights

    def to_model(self) -> onnx.ModelProto:
        """Return the model with these nodes and the initialisers that they read."""
        used = {name for node in self.nodes for name in node.input}
        for name, weight in self.weights.items():
            if name in used:
                self.add_constant(name, weight.read())
        initializers = [tensor for name, tensor in self.constants.items() if name in used]
        nodes = [NodeProto.FromString(node.SerializeToString()) for node in self.nodes]
        graph = self.model.graph
        replace_elements(graph.node, nodes)
        replace_elements(graph.initializer, initializers)
        replace_elements(graph.value_info, [])
        domains = {opset.domain for opset in self.model.opset_import}
        if MICROSOFT not in domains:
            opset = helper.make_opsetid(MICROSOFT, 1)
            self.model.opset_import.append(opset)
        return self.model


def value_shape(value: onnx.ValueInfoProto) -> tuple[int, ...]:
    """Return the shape of a value without dynamic sizes."""
    return tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)


def replace_elements(field: Any, values: Sequence[Any]) -> None:
    """Replace all elements of a repeated protobuf field."""
    del field[:]
    field.extend(values)


def fuse_graph(graph: Graph) -> Graph:
    """Fuse nodes of a graph in place and return it."""
    fold_transposes(graph)
    fold_offsets(graph)
    drop_attention_reshapes(graph)
    merge_products(graph)
    fuse_residual_norms(graph)
    return graph


def fold_transposes(graph: Graph) -> None:
    """Replace the transposes of weights by transposed weights."""
    transposes = [
        node
        for node in graph.nodes
        if node.op_type == "Transpose" and node.input[0] in graph.weights
    ]
    for node in transposes:
        graph.weights[node.output[0]] = graph.weights[node.input[0]].transposed()
    graph.replace_nodes(graph.without(transposes))


def fold_offsets(graph: Graph) -> None:
    """Replace the sums of a weight and a number by weights."""
    sums: list[NodeProto] = []
    for node in graph.nodes:
        offset = graph.number(node.input[1]) if node.op_type == "Add" else None
        if offset is not None and node.input[0] in graph.weights:
            graph.weights[node.output[0]] = graph.weights[node.input[0]].plus(offset)
            sums.append(node)
    graph.replace_nodes(graph.without(sums))


def drop_attention_reshapes(graph: Graph) -> None:
    """Connect attention to the products around it; both use [1, s, heads * head_dim]."""
    dropped: list[NodeProto] = []
    for node in graph.nodes:
        if node.op_type == ATTENTION:
            dropped += [*bypass_reshapes_before(graph, node), *bypass_reshapes_after(graph, node)]
    graph.replace_nodes(graph.without(dropped))


def bypass_reshapes_before(graph: Graph, attention: NodeProto) -> list[NodeProto]:
    """Connect query, key and value to their products; return the reshapes that are unused now."""
    dropped: list[NodeProto] = []
    for i in range(3):
        chain = reshapes_before(graph, attention.input[i])
        source = chain[-1].input[0] if chain else attention.input[i]
        producer = graph.producers.get(source)
        if producer is not None and producer.op_type in ("MatMul", "Add", "Slice"):
            attention.input[i] = source
            dropped += chain
    return dropped


def bypass_reshapes_after(graph: Graph, attention: NodeProto) -> list[NodeProto]:
    """Connect products to the attention's output; return the reshapes that are unused now."""
    dropped: list[NodeProto] = []
    output = attention.output[0]
    for reshape in graph.readers[output]:
        readers = graph.readers[reshape.output[0]]
        feeds_products = all(reader.op_type == "MatMul" for reader in readers)
        if reshape.op_type == "Reshape" and feeds_products:
            for reader in readers:
                reader.input[0] = output
            dropped.append(reshape)
    return dropped


def reshapes_before(graph: Graph, name: str) -> list[NodeProto]:
    """Return the reshapes that lead to value `name` and to nothing else, last first."""
    chain: list[NodeProto] = []
    node = graph.producers.get(name)
    while node is not None and node.op_type == "Reshape" and len(graph.readers[name]) == 1:
        chain.append(node)
        name = node.input[0]
        node = graph.producers.get(name)
    return chain


def merge_products(graph: Graph) -> None:
    """Merge products of one value by several weights into one product.

    The result is then split, or stays packed for the attention that reads it.
    """
    groups: defaultdict[str, list[NodeProto]] = defaultdict(list)
    for node in graph.nodes:
        if graph.is_product(node):
            groups[node.input[0]].append(node)
    merged: dict[int, list[NodeProto]] = {}
    for group in groups.values():
        if len(group) > 1:
            merged |= {id(node): [] for node in group}
            merged[id(group[0])] = merge_group(graph, group)
    nodes: list[NodeProto] = []
    for node in graph.nodes:
        nodes += merged.get(id(node), [node])
    graph.replace_nodes(nodes)


def merge_group(graph: Graph, products: list[NodeProto]) -> list[NodeProto]:
    """Return one product for `products`, which read the same value.

    A Split that restores the single outputs follows, unless an attention reads the packed output.
    """
    weights = [graph.weights[node.input[1]] for node in products]
    widths = [weight.shape[1] for weight in weights]
    parts = tuple(part for weight in weights for part in weight.parts)
    names = tuple(name for weight in weights for name in weight.names)
    name = "+".join(node.input[1] for node in products)
    shape = (weights[0].shape[0], sum(widths))
    graph.weights[name] = replace(weights[0], shape=shape, parts=parts, names=names)
    outputs = [node.output[0] for node in products]
    product = helper.make_node(
        "MatMul",
        [products[0].input[0], name],
        [f"{name}.out"],
        name=f"product_{name}",
    )
    if pack_attention_inputs(graph, outputs, product.output[0]):
        return [product]
    sizes = graph.add_constant(f"{name}.sizes", np.array(widths, np.int64))
    split = helper.make_node(
        "Split",
        [product.output[0], sizes],
        outputs,
        axis=-1,
        name=f"split_{name}",
    )
    return [product, split]


def pack_attention_inputs(graph: Graph, outputs: list[str], packed: str) -> bool:
    """Feed `packed` to the attention whose query, key and value are `outputs`.

    Return False and change nothing if there is no such attention, or if any other node reads
    `outputs`.
    """
    readers = [reader for output in outputs for reader in graph.readers[output]]
    attention = readers[0]
    if attention.op_type != ATTENTION or len(readers) != 3:
        return False
    if list(attention.input[:3]) != outputs:
        return False
    attention.input[0] = packed
    attention.input[1] = ""
    attention.input[2] = ""
    return True


def fuse_residual_norms(graph: Graph) -> None:
    """Fuse ``norm(a + b)`` and the sum, which later nodes read as well, into one node."""
    fused: dict[int, NodeProto] = {}
    norms: list[NodeProto] = []
    for norm in graph.nodes:
        residual_sum = graph.producers.get(norm.input[0])
        if norm.op_type != NORM or residual_sum is None or id(residual_sum) in fused:
            continue
        if is_residual_sum(graph, residual_sum):
            fused[id(residual_sum)] = skip_norm(residual_sum, norm)
            norms.append(norm)
    graph.replace_nodes(fused.get(id(node), node) for node in graph.without(norms))


def is_residual_sum(graph: Graph, node: NodeProto) -> bool:
    """Return whether `node` adds two values, neither of which is a weight."""
    constants = graph.weights.keys() | graph.constants.keys()
    return node.op_type == "Add" and constants.isdisjoint(node.input)


def skip_norm(residual_sum: NodeProto, norm: NodeProto) -> NodeProto:
    """Return the node that gives both a sum's and its norm's output."""
    attributes = {attribute.name: attribute for attribute in norm.attribute}
    inputs = [*residual_sum.input, norm.input[1]]
    outputs = [norm.output[0], "", "", residual_sum.output[0]]
    return helper.make_node(
        f"Skip{NORM}",
        inputs,
        outputs,
        domain=MICROSOFT,
        epsilon=attributes["epsilon"].f,
        name=f"skip_{norm.output[0]}",
    )
