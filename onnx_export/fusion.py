"""Fewer nodes for the same result: a step on a small device is made of many short operations.

Products of one input by several weights become one product, the three that feed an attention directly stay packed, a
residual sum and the norm after it become ``SkipSimplifiedLayerNormalization``, and reshapes that change nothing go.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper

MICROSOFT = "com.microsoft"
ATTENTION = "GroupQueryAttention"
NORM = "SimplifiedLayerNormalization"


class Graph:
    """A model's nodes in order, with who makes and who reads each value."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.outputs = {value.name for value in model.graph.output}
        self.weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self.nodes: list[NodeProto] = []
        self.replace_nodes(model.graph.node)

    def replace_nodes(self, nodes: Iterable[NodeProto]) -> None:
        """Takes `nodes`, in an order in which they can run, for the present ones."""
        self.nodes = list(nodes)
        self.maker = {name: node for node in self.nodes for name in node.output if name}
        self.readers: defaultdict[str, list[NodeProto]] = defaultdict(list)
        for node in self.nodes:
            for name in node.input:
                self.readers[name].append(node)

    def without(self, removed: Iterable[NodeProto]) -> list[NodeProto]:
        """The nodes but for `removed`."""
        ids = {id(node) for node in removed}
        return [node for node in self.nodes if id(node) not in ids]

    def add_weight(self, name: str, value: np.ndarray) -> str:
        """An initializer of that name, once."""
        if name not in self.weights:
            self.weights[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name

    def array(self, name: str) -> np.ndarray:
        """An initializer's value."""
        return numpy_helper.to_array(self.weights[name])

    def is_product(self, node: NodeProto) -> bool:
        """Whether `node` multiplies by a constant matrix."""
        return node.op_type == "MatMul" and node.input[1] in self.weights

    def to_model(self) -> onnx.ModelProto:
        """The model with these nodes and the initializers that they read."""
        read = {name for node in self.nodes for name in node.input}
        nodes = [NodeProto.FromString(node.SerializeToString()) for node in self.nodes]
        weights = [self.weights[name] for name in self.weights if name in read]
        graph = self.model.graph
        for part, values in (
            (graph.node, nodes),
            (graph.initializer, weights),
            (graph.value_info, []),
        ):
            del part[:]
            part.extend(values)
        if all(opset.domain != MICROSOFT for opset in self.model.opset_import):
            self.model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
        return self.model


def fuse(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model, changed in place, with fewer nodes."""
    graph = Graph(model)
    drop_attention_reshapes(graph)
    merge_products(graph)
    fuse_residual_norms(graph)
    return graph.to_model()


def drop_attention_reshapes(graph: Graph) -> None:
    """Attention takes and gives [1, s, heads * head_dim], as the products around it do."""
    dropped = []
    for node in graph.nodes:
        if node.op_type != ATTENTION:
            continue
        for i in range(3):
            chain = reshapes_before(graph, node.input[i])
            source = chain[-1].input[0] if chain else node.input[i]
            if source in graph.maker and graph.maker[source].op_type in ("MatMul", "Add"):
                node.input[i] = source
                dropped += chain
        for reshape in graph.readers[node.output[0]]:
            readers = graph.readers[reshape.output[0]]
            if reshape.op_type == "Reshape" and all(
                reader.op_type == "MatMul" for reader in readers
            ):
                for reader in readers:
                    reader.input[0] = node.output[0]
                dropped.append(reshape)
    graph.replace_nodes(graph.without(dropped))


def reshapes_before(graph: Graph, name: str) -> list[NodeProto]:
    """The reshapes that lead to value `name` and to nothing else, last first."""
    chain: list[NodeProto] = []
    while (
        (node := graph.maker.get(name))
        and node.op_type == "Reshape"
        and len(graph.readers[name]) == 1
    ):
        chain.append(node)
        name = node.input[0]
    return chain


def merge_products(graph: Graph) -> None:
    """Products of one value by several weights become one, split behind it, or packed into the attention it feeds."""
    groups: defaultdict[str, list[NodeProto]] = defaultdict(list)
    for node in graph.nodes:
        if graph.is_product(node):
            groups[node.input[0]].append(node)
    merged: dict[int, list[NodeProto]] = {}
    dropped: list[NodeProto] = []
    for group in groups.values():
        if len(group) > 1:
            merged[id(group[0])] = merge(graph, group)
            dropped += group[1:]
    graph.replace_nodes(
        new for node in graph.without(dropped) for new in merged.get(id(node), [node])
    )


def merge(graph: Graph, products: list[NodeProto]) -> list[NodeProto]:
    """One product for `products`, which read the same value, and what gives the readers their parts."""
    weights = [graph.array(node.input[1]) for node in products]
    name = "+".join(node.input[1] for node in products)
    graph.add_weight(name, np.concatenate(weights, 1))
    outputs = [node.output[0] for node in products]
    product = helper.make_node(
        "MatMul", [products[0].input[0], name], [f"{name}.out"], name=f"product_{name}"
    )
    readers = [reader for output in outputs for reader in graph.readers[output]]
    attention = readers[0]
    if (
        attention.op_type == ATTENTION
        and list(attention.input[:3]) == outputs
        and len(readers) == 3
    ):
        attention.input[0] = product.output[0]
        attention.input[1] = ""
        attention.input[2] = ""
        return [product]
    sizes = graph.add_weight(
        f"{name}.sizes", np.array([weight.shape[1] for weight in weights], np.int64)
    )
    return [
        product,
        helper.make_node(
            "Split", [product.output[0], sizes], outputs, axis=-1, name=f"split_{name}"
        ),
    ]


def fuse_residual_norms(graph: Graph) -> None:
    """``norm(a + b)`` with the sum that goes on becomes one node."""
    fused: dict[int, NodeProto] = {}
    norms = []
    for norm in graph.nodes:
        total = graph.maker.get(norm.input[0]) if norm.op_type == NORM else None
        if (
            total is None
            or total.op_type != "Add"
            or id(total) in fused
            or graph.weights.keys() & set(total.input)
        ):
            continue
        epsilon = next(attribute.f for attribute in norm.attribute if attribute.name == "epsilon")
        fused[id(total)] = helper.make_node(
            f"Skip{NORM}",
            [*total.input, norm.input[1]],
            [norm.output[0], "", "", total.output[0]],
            domain=MICROSOFT,
            epsilon=epsilon,
            name=f"skip_{norm.output[0]}",
        )
        norms.append(norm)
    graph.replace_nodes(fused.get(id(node), node) for node in graph.without(norms))
