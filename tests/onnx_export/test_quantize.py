"""Quantised products give the values of their weights on any grid."""

from __future__ import annotations

import gguf
import numpy as np
import onnxruntime as ort
import pytest
import torch
from gguf import GGMLQuantizationType
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper

from onnx_export.fusion import Graph
from onnx_export.grid import BLOCK_SIZE, Grid
from onnx_export.quantize import product_weights, quantize, quantize_symmetric

Floats = NDArray[np.float32]
RNG = np.random.default_rng(5)


def on_a_grid(k: int, n: int) -> Floats:
    """Return a weight [k, n] of 16 steps a block.

    0 is anywhere between least and largest, which are both reached.
    """
    blocks = RNG.integers(0, 16, (n, k // BLOCK_SIZE, BLOCK_SIZE))
    blocks[..., 0] = 0
    blocks[..., 1] = 15
    scale = RNG.uniform(0.01, 0.1, blocks.shape[:2])
    zero = RNG.uniform(0, 15, blocks.shape[:2])
    weight: Floats = (
        ((blocks - zero[..., None]) * scale[..., None]).reshape(n, k).T.astype(np.float32)
    )
    return weight


def inputs(length: int, k: int) -> Floats:
    """Return [1, length, k] that rounding to 8 bits, block by block, does not change.

    So all errors come from the weights.
    """
    x = RNG.integers(-127, 128, (1, length, k)).astype(np.float32)
    x[..., ::BLOCK_SIZE] = 127
    return x / np.float32(127)


def product_graph(weight: Floats) -> Graph:
    k, n = weight.shape
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "product",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, "s", k]),
            helper.make_tensor_value_info("w", TensorProto.FLOAT, [k, n]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, "s", n])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return Graph(model, {"w": lambda: torch.from_numpy(weight)})


def run(graph: Graph, x: Floats) -> Floats:
    session = ort.InferenceSession(
        graph.to_model().SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (y,) = session.run(["y"], {"x": x})
    out: Floats = y
    return out


def error(graph: Graph, weight: Floats, x: Floats) -> float:
    expected = x @ weight
    return float(np.linalg.norm(run(graph, x) - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("k", [64, 96, 576])
@pytest.mark.parametrize("length", [1, 7])
def test_weights_on_a_grid_are_kept_in_four_bits_as_well_as_in_eight(k: int, length: int) -> None:
    weight = on_a_grid(k, 48)
    x = inputs(length, k)
    symmetric = quantize_symmetric(product_graph(weight), bits=4, block_size=BLOCK_SIZE)
    assert error(quantize(product_graph(weight), "int8"), weight, x) < 0.01
    assert error(quantize(product_graph(weight), "int4"), weight, x) < 0.01
    assert error(symmetric, weight, x) > 0.03


def test_a_grid_is_found_exactly() -> None:
    weight = on_a_grid(128, 32)
    np.testing.assert_allclose(Grid.fit(weight).weights, weight, atol=1e-6)


@pytest.mark.parametrize(("kind", "columns"), [("Q8_0", 256), ("Q5_1", 256 + 2 * 8)])
@pytest.mark.parametrize("length", [1, 7])
def test_weights_on_a_finer_grid_have_eight_bits_that_keep_them(
    kind: str, columns: int, length: int
) -> None:
    normal = RNG.standard_normal((48, 256)).astype(np.float32)
    quantized = GGMLQuantizationType[kind]
    weight = gguf.dequantize(gguf.quantize(normal, quantized), quantized).T
    graph = quantize(product_graph(weight), "balanced")
    product = graph.nodes[-1]
    assert (attribute(product, "bits"), attribute(product, "K")) == (8, columns)
    assert product_weights(product) == weight.size
    assert error(graph, weight, inputs(length, 256)) < 2e-3


def test_a_raised_product_has_eight_bits() -> None:
    weight = on_a_grid(64, 48)
    (product,) = quantize(product_graph(weight), "balanced", frozenset({"w"})).nodes
    assert attribute(product, "bits") == 8


def attribute(node: NodeProto, name: str) -> int:
    return next(int(each.i) for each in node.attribute if each.name == name)


def test_weights_on_no_grid_come_nearer_than_from_least_to_largest() -> None:
    weight = RNG.standard_normal((256, 64)).astype(np.float32)
    blocks = weight.T.reshape(64, 8, BLOCK_SIZE)
    low = blocks.min(-1, keepdims=True)
    step = (blocks.max(-1, keepdims=True) - low) / 15
    plain = np.square(np.rint((blocks - low) / step) * step + low - blocks).sum()
    grid = Grid.fit(weight)
    fitted = np.square(grid.steps * grid.scale[..., None] + grid.low[..., None] - blocks).sum()
    assert fitted < 0.95 * plain


@pytest.mark.parametrize(
    "weight", [np.zeros((64, 16)), np.full((64, 16), 0.25), np.full((64, 16), -3.0)]
)
def test_constant_blocks_are_no_trouble(weight: Floats) -> None:
    x = inputs(3, 64)
    weight = weight.astype(np.float32)
    np.testing.assert_allclose(
        run(quantize(product_graph(weight), "int4"), x), x @ weight, atol=0.05
    )


def test_inputs_without_whole_blocks_fall_back_to_eight_bits() -> None:
    weight = RNG.standard_normal((48, 16)).astype(np.float32)
    graph = quantize(product_graph(weight), "int4")
    (node,) = graph.nodes
    assert (node.op_type, attribute(node, "bits")) == ("MatMulNBits", 8)
    assert error(graph, weight, inputs(4, 48)) < 0.01
