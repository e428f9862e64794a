"""Weight-only quantisation of edge graphs, in blocks of 32 weights of one output.

``int8`` is symmetric. ``int4`` and ``balanced`` use a grid of 16 steps with a scale and an offset
for each block, ``w = scale * (q - zero) + rest``, which represents a llama.cpp Q4_1 file's weights
up to the precision of `rest`. MatMulNBits multiplies by ``scale * (q - zero)`` with an integer
`zero`; the rest, at most half a step and the same for a whole block, is multiplied by the block's
mean, which joins the input as a few more columns (docs/adr/0010). ``balanced`` also multiplies
query, key and value by float32 inputs instead of int8 ones: most of the loss is there.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from onnx import NodeProto, helper
from onnxruntime.quantization.matmul_nbits_quantizer import (
    DefaultWeightOnlyQuantConfig,
    DefaultWeightOnlyQuantizer,
)
from onnxruntime.quantization.quant_utils import QuantFormat

from onnx_export.config import Quantization
from onnx_export.fusion import ATTENTION, MICROSOFT, Graph
from onnx_export.graph_weights import Array, Floats

Bytes = npt.NDArray[np.uint8]

BLOCK_SIZE: Final = 32
PREVIEW_BLOCK_SIZE: Final = 64
FLOAT_COMPUTE: Final = 1  # accuracy levels of MatMulNBits: float32 inputs and sums
INT8_COMPUTE: Final = 4  # int8 inputs, rounded block by block, and int32 sums
LEVELS: Final = 15
MIDDLE: Final = 8  # the level that stands for 0 in the columns of the rest
REST_COLUMNS: Final = 2
"""Columns of 16 steps each for the rest: together 31 steps for half a grid step on either side."""
NUM_REFINEMENTS: Final = 4


def quantize(graph: Graph, preset: Quantization) -> Graph:
    """Quantise the products of a block's graph in place; ``fp32`` changes nothing."""
    if preset == "fp32":
        return graph
    if preset != "int8":
        quantize_affine(graph, float_attention=preset == "balanced")
    return quantize_symmetric(graph, bits=8, block_size=BLOCK_SIZE)


def quantize_preview(graph: Graph, preset: Quantization) -> Graph:
    """Quantise the LM head's product, which only chooses tokens, to 4 bits, except for ``fp32``."""
    if preset == "fp32":
        return graph
    return quantize_symmetric(graph, bits=4, block_size=PREVIEW_BLOCK_SIZE)


def quantize_symmetric(graph: Graph, *, bits: int, block_size: int) -> Graph:
    """Quantise every remaining product with ONNX Runtime's own quantiser."""
    config = DefaultWeightOnlyQuantConfig(
        block_size=block_size, is_symmetric=True, bits=bits, quant_format=QuantFormat.QOperator
    )
    quantizer = DefaultWeightOnlyQuantizer(config)

    def product(node: NodeProto) -> NodeProto:
        pieces = graph.weights[node.input[1]].pieces()
        quantized = [
            quantizer.qbits_block_quant(np.ascontiguousarray(piece))[:2] for piece in pieces
        ]
        return quantized_product(
            graph,
            node,
            node.input[0],
            with_scale_rows(*joined(quantized)),
            K=graph.weights[node.input[1]].shape[0],
            bits=bits,
            block_size=block_size,
            accuracy_level=INT8_COMPUTE,
        )

    graph.replace_nodes(product(node) if graph.is_product(node) else node for node in graph.nodes)
    return graph


def joined(pieces: Iterable[Sequence[Array]]) -> list[Array]:
    """Join the arrays of pieces of a weight, output by output."""
    return [np.concatenate(arrays) for arrays in zip(*pieces, strict=True)]


def with_scale_rows(steps: Bytes, scales: Floats) -> tuple[Bytes, Floats]:
    """Return steps and scales [n, blocks], which ONNX Runtime 1.22 returns as [n * blocks]."""
    return steps, scales.reshape(len(steps), -1)


def quantized_product(
    graph: Graph, product: NodeProto, x: str, weights: Sequence[Array], **attributes: int
) -> NodeProto:
    """Return `product` as MatMulNBits of the value `x` by `weights`: steps, scales, any zeros."""
    name = product.input[1]
    inputs = [
        graph.add_constant(f"{name}.{kind}", array)
        for kind, array in zip(("steps", "scales", "zeros"), weights, strict=False)
    ]
    return helper.make_node(
        "MatMulNBits",
        [x, *inputs],
        list(product.output),
        name=f"quantized_{product.name or name}",
        domain=MICROSOFT,
        N=len(weights[0]),
        **attributes,
    )


@dataclass(frozen=True)
class Grid:
    """Weights ``scale * steps + low``.

    `steps` uint8 [n, blocks, 32] from 0 to 15; `scale` and `low` float32 [n, blocks].
    """

    steps: Bytes
    scale: Floats
    low: Floats

    @classmethod
    def fit(cls, weight: Floats) -> Grid:
        """Return the grid of weight [k, n].

        For blocks on no grid of 16 steps it is near the one of the least squared error.
        """
        blocks = weight.T.reshape(weight.shape[1], -1, BLOCK_SIZE)
        low = blocks.min(-1)
        span = blocks.max(-1) - low
        best = cls._round(blocks, span / LEVELS, low)
        least = best._error(blocks)
        for _ in range(NUM_REFINEMENTS):
            scale, low = best._regression(blocks)
            refined = cls._round(blocks, scale, low)
            error = refined._error(blocks)
            is_better = error < least
            best = best._replace_where(is_better, refined)
            least = np.where(is_better, error, least)
        return best

    @classmethod
    def _round(cls, blocks: Floats, scale: Floats, low: Floats) -> Grid:
        scale = np.where(scale > 0, scale, 1).astype(np.float32)
        positions = (blocks - low[..., None]) / scale[..., None]
        steps = np.clip(np.rint(positions), 0, LEVELS)
        return cls(steps.astype(np.uint8), scale, low.astype(np.float32))

    def _replace_where(self, mask: npt.NDArray[np.bool_], other: Grid) -> Grid:
        return Grid(
            np.where(mask[..., None], other.steps, self.steps),
            np.where(mask, other.scale, self.scale),
            np.where(mask, other.low, self.low),
        )

    def _regression(self, blocks: Floats) -> tuple[Floats, Floats]:
        """Return scale and low of the least squared error for these steps."""
        steps = self.steps.astype(np.float32)
        mean = steps.mean(-1)
        target = blocks.mean(-1)
        deviation = steps - mean[..., None]
        variance = np.square(deviation).sum(-1)
        covariance = (deviation * (blocks - target[..., None])).sum(-1)
        slope = covariance / np.where(variance > 0, variance, 1)
        scale = np.where(slope > 0, slope, self.scale)
        return scale, target - scale * mean

    def _error(self, blocks: Floats) -> Floats:
        weights = self.scale[..., None] * self.steps + self.low[..., None]
        error: Floats = np.square(weights - blocks).sum(-1)
        return error


def quantize_affine(graph: Graph, *, float_attention: bool) -> None:
    """Quantise products with whole blocks on a grid; `float_attention`: float32 q, k and v."""
    precise = {id(node) for node in attention_products(graph)} if float_attention else set()
    extended: dict[str, str] = {}
    nodes: list[NodeProto] = []
    for node in graph.nodes:
        if not graph.is_product(node) or graph.weights[node.input[1]].shape[0] % BLOCK_SIZE:
            nodes.append(node)
            continue
        name = node.input[0]
        if name not in extended:
            extended[name] = f"{name}.with_means"
            nodes += with_means(name, extended[name])
        level = FLOAT_COMPUTE if id(node) in precise else INT8_COMPUTE
        nodes.append(grid_product(graph, node, extended[name], level))
    graph.replace_nodes(nodes)


def with_means(name: str, extended: str) -> list[NodeProto]:
    """Return nodes that append each block's mean twice: [1, s, k] to [1, s, k + 2 * blocks]."""
    means = f"{name}.means"
    pool = helper.make_node(
        "AveragePool",
        [name],
        [means],
        name=f"means_{name}",
        kernel_shape=[BLOCK_SIZE],
        strides=[BLOCK_SIZE],
    )
    concat = helper.make_node(
        "Concat",
        [name, *[means] * REST_COLUMNS],
        [extended],
        name=f"with_means_{name}",
        axis=-1,
    )
    return [pool, concat]


def grid_product(graph: Graph, product: NodeProto, extended: str, accuracy_level: int) -> NodeProto:
    """Return `product` as MatMulNBits on its weights' grid, with means in its input."""
    weight = graph.weights[product.input[1]]
    blocks = weight.shape[0] // BLOCK_SIZE
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        weights = joined(pool.map(lambda piece: grid_weights(Grid.fit(piece)), weight.pieces()))
    return quantized_product(
        graph,
        product,
        extended,
        weights,
        K=blocks * (BLOCK_SIZE + REST_COLUMNS),
        bits=4,
        block_size=BLOCK_SIZE,
        accuracy_level=accuracy_level,
    )


def grid_weights(grid: Grid) -> tuple[Bytes, Floats, Bytes]:
    """Return packed steps, scales and packed zeros of MatMulNBits, with the rest's columns."""
    n, blocks = grid.scale.shape
    zero = np.clip(np.rint(-grid.low / grid.scale), 0, LEVELS).astype(np.uint8)
    rest = (grid.low + zero * grid.scale) * BLOCK_SIZE
    columns, rest_scale = rest_columns(rest)
    num_rest_blocks = -(-REST_COLUMNS * blocks // BLOCK_SIZE)
    num_padding = num_rest_blocks * BLOCK_SIZE - REST_COLUMNS * blocks
    padding = np.full((n, num_padding), MIDDLE, np.uint8)
    steps = np.concatenate([grid.steps.reshape(n, -1), *columns, padding], 1)
    rest_scales = np.repeat(rest_scale, num_rest_blocks, 1)
    scales = np.concatenate([grid.scale, rest_scales], 1)
    num_zeros = num_rest_blocks + scales.shape[1] % 2
    rest_zeros = np.full((n, num_zeros), MIDDLE, np.uint8)
    zeros = np.concatenate([zero, rest_zeros], 1)
    packed = pack_nibbles(steps).reshape(n, -1, BLOCK_SIZE // 2)
    return packed, scales, pack_nibbles(zeros)


def rest_columns(rest: Floats) -> tuple[list[Bytes], Floats]:
    """Return rest [n, blocks] as columns of steps, uint8 [n, blocks] each, and a scale [n, 1]."""
    limit = REST_COLUMNS * (LEVELS - MIDDLE)
    largest = np.abs(rest).max(1, keepdims=True)
    scale = np.maximum(largest / limit, np.finfo(np.float32).tiny).astype(np.float32)
    levels = np.rint(rest / scale).astype(np.int64) + REST_COLUMNS * MIDDLE
    columns = [((levels + i) // REST_COLUMNS).astype(np.uint8) for i in range(REST_COLUMNS)]
    return columns, scale


def pack_nibbles(values: Bytes) -> Bytes:
    """Pack pairs of values [n, even] below 16 into bytes [n, even / 2], the first one low."""
    packed: Bytes = values[:, 0::2] | (values[:, 1::2] << np.uint8(4))
    return packed


def attention_products(graph: Graph) -> list[NodeProto]:
    """Return the products that give query, key and value, with any nodes between them."""
    products: list[NodeProto] = []
    names: list[str] = []
    for node in graph.nodes:
        if node.op_type == ATTENTION:
            names += node.input[:3]
    while names:
        producer = graph.producers.get(names.pop())
        if producer is None or producer in products:
            continue
        if graph.is_product(producer):
            products.append(producer)
        else:
            names += producer.input
    return products
