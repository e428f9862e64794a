"""Weight-only quantisation of edge graphs, in blocks of 32 weights of one output.

``int8`` is symmetric. ``int4`` and ``balanced`` keep a grid of 16 steps with a scale and an offset of its own for each
block, ``w = scale * (q - zero) + rest``, which holds a llama.cpp Q4_1 file's weights but for the precision of `rest`.
MatMulNBits multiplies by ``scale * (q - zero)`` with a whole `zero`; the rest, at most half a step and the same for a
whole block, is multiplied by the block's mean, which joins the input as a few more columns (docs/adr/0010).
``balanced`` also multiplies query, key and value by float32 inputs instead of int8 ones: most of the loss is there.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto, helper
from onnxruntime.quantization.matmul_nbits_quantizer import (
    DefaultWeightOnlyQuantConfig,
    MatMulNBitsQuantizer,
)
from onnxruntime.quantization.quant_utils import QuantFormat

from onnx_export.config import Quantization
from onnx_export.fusion import ATTENTION, MICROSOFT, Graph

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

BLOCK_SIZE: Final = 32
PREVIEW_BLOCK_SIZE: Final = 64
FLOAT_COMPUTE: Final = 1  # accuracy levels of MatMulNBits: float32 inputs and sums
INT8_COMPUTE: Final = 4  # int8 inputs, rounded block by block, and int32 sums
LEVELS: Final = 15
REST_COLUMNS: Final = (
    2  # of 16 steps each: together 31 steps for half a step of the grid, either side
)
NUM_REFINEMENTS: Final = 4


def quantize(graph: onnx.ModelProto, preset: Quantization) -> onnx.ModelProto:
    """The graph of a block with its products quantised; ``fp32`` changes nothing."""
    if preset == "fp32":
        return graph
    if preset != "int8":
        graph = quantize_affine(graph, float_attention=preset == "balanced")
    return quantize_symmetric(graph, bits=8, block_size=BLOCK_SIZE)


def quantize_preview(graph: onnx.ModelProto, preset: Quantization) -> onnx.ModelProto:
    """The LM head's graph, whose product only chooses the tokens that are computed exactly, with 4-bit weights."""
    return (
        graph
        if preset == "fp32"
        else quantize_symmetric(graph, bits=4, block_size=PREVIEW_BLOCK_SIZE)
    )


def quantize_symmetric(graph: onnx.ModelProto, *, bits: int, block_size: int) -> onnx.ModelProto:
    """Every product that is left, by ONNX Runtime's own quantiser."""
    config = DefaultWeightOnlyQuantConfig(
        block_size=block_size,
        is_symmetric=True,
        accuracy_level=INT8_COMPUTE,
        bits=bits,
        quant_format=QuantFormat.QOperator,
        op_types_to_quantize=("MatMul",),
    )
    logging.getLogger("onnxruntime.quantization.matmul_nbits_quantizer").setLevel(logging.WARNING)
    quantizer = MatMulNBitsQuantizer(graph, algo_config=config)
    quantizer.process()
    result: onnx.ModelProto = quantizer.model.model
    return result


@dataclass(frozen=True)
class Grid:
    """Weights ``scale * steps + low``: steps uint8 [n, blocks, 32] from 0 to 15, scale and low float32 [n, blocks]."""

    steps: Bytes
    scale: Floats
    low: Floats

    @classmethod
    def fit(cls, weight: Floats) -> Grid:
        """The grid of weight [k, n]; of blocks on no grid of 16 steps, one near the least squared error."""
        blocks = weight.T.reshape(weight.shape[1], -1, BLOCK_SIZE)
        low = blocks.min(-1)
        best = cls._round(blocks, (blocks.max(-1) - low) / LEVELS, low)
        least = best._error(blocks)
        for _ in range(NUM_REFINEMENTS):
            refined = cls._round(blocks, *best._regression(blocks))
            error = refined._error(blocks)
            better = error < least
            least = np.where(better, error, least)
            best = cls(
                np.where(better[..., None], refined.steps, best.steps),
                np.where(better, refined.scale, best.scale),
                np.where(better, refined.low, best.low),
            )
        return best

    @classmethod
    def _round(cls, blocks: Floats, scale: Floats, low: Floats) -> Grid:
        scale = np.where(scale > 0, scale, 1).astype(np.float32)
        steps = np.clip(np.rint((blocks - low[..., None]) / scale[..., None]), 0, LEVELS)
        return cls(steps.astype(np.uint8), scale, low.astype(np.float32))

    def _regression(self, blocks: Floats) -> tuple[Floats, Floats]:
        """Scale and low of the least squared error for these steps."""
        steps = self.steps.astype(np.float32)
        mean = steps.mean(-1)
        target = blocks.mean(-1)
        spread = np.square(steps - mean[..., None]).sum(-1)
        slope = ((steps - mean[..., None]) * (blocks - target[..., None])).sum(-1) / np.where(
            spread > 0, spread, 1
        )
        scale = np.where(slope > 0, slope, self.scale)
        return scale, target - scale * mean

    def _error(self, blocks: Floats) -> Floats:
        error: Floats = np.square(
            self.scale[..., None] * self.steps + self.low[..., None] - blocks
        ).sum(-1)
        return error


def quantize_affine(model: onnx.ModelProto, *, float_attention: bool) -> onnx.ModelProto:
    """Products whose inputs have whole blocks, on their grid; `float_attention`: in float32 before attention."""
    graph = Graph(model)
    precise = {id(node) for node in attention_products(graph)} if float_attention else set()
    extended: dict[str, str] = {}
    nodes: list[NodeProto] = []
    for node in graph.nodes:
        if not graph.is_product(node) or graph.array(node.input[1]).shape[0] % BLOCK_SIZE:
            nodes.append(node)
            continue
        name = node.input[0]
        if name not in extended:
            extended[name] = f"{name}.with_means"
            nodes += with_means(name, extended[name])
        level = FLOAT_COMPUTE if id(node) in precise else INT8_COMPUTE
        nodes.append(grid_product(graph, node, extended[name], level))
    graph.replace_nodes(nodes)
    return graph.to_model()


def with_means(name: str, extended: str) -> list[NodeProto]:
    """Nodes that give [1, s, k + 2 * blocks] of [1, s, k]: the input and, twice, the mean of each of its blocks."""
    means = f"{name}.means"
    window = {"kernel_shape": [BLOCK_SIZE], "strides": [BLOCK_SIZE]}
    return [
        helper.make_node("AveragePool", [name], [means], name=f"means_{name}", **window),
        helper.make_node(
            "Concat",
            [name, *[means] * REST_COLUMNS],
            [extended],
            name=f"with_means_{name}",
            axis=-1,
        ),
    ]


def grid_product(graph: Graph, product: NodeProto, extended: str, accuracy_level: int) -> NodeProto:
    """`product` as MatMulNBits on its weights' grid, of the input with means."""
    name = product.input[1]
    grid = Grid.fit(graph.array(name))
    n, blocks = grid.scale.shape
    zero = np.clip(np.rint(-grid.low / grid.scale), 0, LEVELS).astype(np.uint8)
    rest = (grid.low + zero * grid.scale) * BLOCK_SIZE
    middle = 8
    limit = REST_COLUMNS * (LEVELS - middle)
    rest_scale = np.maximum(
        np.abs(rest).max(1, keepdims=True) / limit, np.finfo(np.float32).tiny
    ).astype(np.float32)
    levels = np.rint(rest / rest_scale).astype(np.int64) + REST_COLUMNS * middle
    columns = [((levels + i) // REST_COLUMNS).astype(np.uint8) for i in range(REST_COLUMNS)]
    num_rest_blocks = -(-REST_COLUMNS * blocks // BLOCK_SIZE)
    padding = np.full((n, num_rest_blocks * BLOCK_SIZE - REST_COLUMNS * blocks), middle, np.uint8)
    steps = np.concatenate([grid.steps.reshape(n, -1), *columns, padding], 1)
    scales = np.concatenate([grid.scale, np.repeat(rest_scale, num_rest_blocks, 1)], 1)
    zeros = np.concatenate(
        [zero, np.full((n, num_rest_blocks + scales.shape[1] % 2), middle, np.uint8)], 1
    )
    inputs = [
        extended,
        graph.add_weight(f"{name}.steps", pack(steps).reshape(n, -1, BLOCK_SIZE // 2)),
        graph.add_weight(f"{name}.scales", scales),
        graph.add_weight(f"{name}.zeros", pack(zeros)),
    ]
    return helper.make_node(
        "MatMulNBits",
        inputs,
        list(product.output),
        name=f"grid_{product.name or name}",
        domain=MICROSOFT,
        K=blocks * (BLOCK_SIZE + REST_COLUMNS),
        N=n,
        bits=4,
        block_size=BLOCK_SIZE,
        accuracy_level=accuracy_level,
    )


def pack(values: Bytes) -> Bytes:
    """Neighbours of values [n, even] below 16 share a byte, the first in the lower half: [n, even / 2]."""
    packed: Bytes = values[:, 0::2] | (values[:, 1::2] << np.uint8(4))
    return packed


def attention_products(graph: Graph) -> list[NodeProto]:
    """The products that give query, key and value, whatever lies between them and attention."""
    found: list[NodeProto] = []
    names = [name for node in graph.nodes if node.op_type == ATTENTION for name in node.input[:3]]
    while names:
        node = graph.maker.get(names.pop())
        if node is None or node in found:
            continue
        if graph.is_product(node):
            found.append(node)
        else:
            names += node.input
    return found
