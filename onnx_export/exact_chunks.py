"""Graph changes that give a chunk of positions the same bits as single positions.

The kernels of ONNX Runtime for one row and for several rows round differently, and the rounding of
inputs to 8 bits enlarges this to a whole step of its grid. Only products with inputs of 8 bits have
the same bits for any number of rows. So attention always has a further row, and products with
precise inputs are two products of 8 bits (docs/adr/0052).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
from onnx import NodeProto, TensorProto, helper

from onnx_export.fusion import ATTENTION, Graph
from onnx_export.graph_weights import Array
from onnx_export.grid import BLOCK_SIZE

LARGEST_INT8: Final = 127
PAIR: Final = ".pair"


def pad_attention(graph: Graph) -> None:
    """Let each attention run over one more position than its input has, and drop its output.

    The cache's row after the newest position then holds the further row, which the next run
    overwrites. So a cache needs room for one more position.
    """
    if not any(node.op_type == ATTENTION for node in graph.nodes):
        return
    one = constant(graph, "one", np.array(1, np.int32))
    nodes = [
        helper.make_node("Add", [name, one], [f"{name}.padded"], name=f"pad_{name}")
        for name in ("seqlens_k", "total_length")
    ]
    for node in graph.nodes:
        nodes += padded_attention(graph, node) if node.op_type == ATTENTION else [node]
    graph.replace_nodes(nodes)


def padded_attention(graph: Graph, attention: NodeProto) -> list[NodeProto]:
    """Return an attention with a further row, between the nodes that add and remove it."""
    widths = input_widths(graph, attention)
    nodes: list[NodeProto] = []
    for i, width in enumerate(widths):
        name = attention.input[i]
        zeros = constant(graph, f"zeros.{width}", np.zeros((1, 1, width), np.float32))
        padded = f"{name}.padded"
        nodes.append(helper.make_node("Concat", [name, zeros], [padded], name=padded, axis=1))
        attention.input[i] = padded
    lengths = ("seqlens_k", "total_length")
    attention.input[:] = [f"{x}.padded" if x in lengths else x for x in attention.input]
    output = attention.output[0]
    attention.output[0] = f"{output}.padded"
    bounds = [
        constant(graph, f"rows.{name}", np.array([value], np.int64))
        for name, value in (("start", 0), ("stop", -1), ("axis", 1))
    ]
    unpadded = helper.make_node(
        "Slice", [attention.output[0], *bounds], [output], name=f"unpadded_{output}"
    )
    return [*nodes, attention, unpadded]


def input_widths(graph: Graph, attention: NodeProto) -> list[int]:
    """Return the widths of query, key and value, or of the one value that packs them."""
    sizes = {attribute.name: attribute.i for attribute in attention.attribute}
    past = next(value for value in graph.model.graph.input if value.name == attention.input[3])
    head_dim = past.type.tensor_type.shape.dim[3].dim_value
    counts = [sizes["num_heads"], sizes["kv_num_heads"], sizes["kv_num_heads"]]
    widths = [count * head_dim for count in counts]
    return widths if attention.input[1] else [sum(widths)]


def precise_product(graph: Graph, x: str, multiply: Callable[[str], NodeProto]) -> list[NodeProto]:
    """Return a product for 15 bits of the value `x`; `multiply` makes one for an input of 8 bits.

    The input has two batches: `x`, and what the kernel's rounding of `x` to 8 bits loses. The
    kernel rounds in blocks of 32, whose largest number becomes 127 steps.
    """
    node = multiply(x + PAIR)
    output = node.output[0]
    node.output[0] = output + PAIR
    axis = constant(graph, "batch_axis", np.array([0], np.int64))
    total = helper.make_node(
        "ReduceSum", [node.output[0], axis], [output], name=f"sum_{output}", keepdims=1
    )
    return [*with_remainder(graph, x), node, total]


def with_remainder(graph: Graph, x: str) -> list[NodeProto]:
    """Return nodes that make of x [1, s, k] the pair [2, s, k] of `x` and its remainder."""
    step = constant(graph, "int8_step", np.array(1 / LARGEST_INT8, np.float32))
    blocks = {"axis": 2, "block_size": BLOCK_SIZE}
    pool = {"kernel_shape": [BLOCK_SIZE], "strides": [BLOCK_SIZE], "ceil_mode": 1}
    steps = {"output_dtype": TensorProto.INT8}
    operators: tuple[tuple[str, list[str], str, dict[str, Any]], ...] = (
        ("Abs", [x], f"{x}.abs", {}),
        ("MaxPool", [f"{x}.abs"], f"{x}.largest", pool),
        ("Mul", [f"{x}.largest", step], f"{x}.scale", {}),
        ("QuantizeLinear", [x, f"{x}.scale"], f"{x}.steps", blocks | steps),
        ("DequantizeLinear", [f"{x}.steps", f"{x}.scale"], f"{x}.rounded", blocks),
        ("Sub", [x, f"{x}.rounded"], f"{x}.remainder", {}),
        ("Concat", [x, f"{x}.remainder"], x + PAIR, {"axis": 0}),
    )
    return [
        helper.make_node(operator, inputs, [output], name=output, **attributes)
        for operator, inputs, output, attributes in operators
    ]


def constant(graph: Graph, name: str, value: Array) -> str:
    """Store a value that several nodes read, once; return its name."""
    return name if name in graph.constants else graph.add_constant(name, value)
