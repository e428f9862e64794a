"""Weight-only quantisation of edge graphs, in blocks of 32 weights of one output.

``int8`` is symmetric. ``int4`` and ``balanced`` use a grid of 16 steps with a scale and an offset
for each block, ``w = scale * (q - zero) + rest``, which represents the weights of llama.cpp's Q4_1
and Q4_K up to the precision of `rest`. Weights on a finer grid, as of Q5_0, Q5_K, Q6_K and Q8_0,
have 8 bits. MatMulNBits multiplies by ``scale * (q - zero)`` with an integer
`zero`; the rest, at most half a step and the same for a whole block, is multiplied by the block's
mean, which joins the input as a few more columns (docs/adr/0010). ``balanced`` also multiplies
query, key and value by inputs of 15 bits instead of 8: most of the loss is there (docs/adr/0052).
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Final

import numpy as np
from onnx import NodeProto, helper
from onnxruntime.quantization.matmul_nbits_quantizer import (
    DefaultWeightOnlyQuantConfig,
    DefaultWeightOnlyQuantizer,
)
from onnxruntime.quantization.quant_utils import QuantFormat

from onnx_export.config import Quantization
from onnx_export.exact_chunks import PAIR, pad_attention, precise_product
from onnx_export.fusion import ATTENTION, MICROSOFT, Graph
from onnx_export.graph_weights import Array, Floats, Weight
from onnx_export.grid import BLOCK_SIZE, Bytes, Grid, needs_bytes

PREVIEW_BITS: Final = 4
PREVIEW_BLOCK_SIZE: Final = 64
INT8_COMPUTE: Final = 4  # accuracy level of MatMulNBits: inputs rounded block by block, int32 sums
WITH_MEANS: Final = ".with_means"
NO_REST: Final = 1e-4  # in steps
REST_COLUMNS: Final = 2
"""Columns for the rest, of 16 steps each in 4 bits: together 31 steps for half a grid step on
either side."""


def quantize(graph: Graph, preset: Quantization, raised: frozenset[str] = frozenset()) -> Graph:
    """Quantise the products of a block's graph in place; ``fp32`` changes nothing.

    Those of the weights named in `raised` have 8 bits in every preset. A chunk of positions then
    has the same bits as single positions.
    """
    if preset == "fp32":
        return graph
    pad_attention(graph)
    precise = {id(node) for node in attention_products(graph)} if preset == "balanced" else set()
    if preset != "int8":
        quantize_affine(graph, precise, raised)
    return quantize_symmetric(graph, bits=8, block_size=BLOCK_SIZE, precise=precise)


def quantize_preview(graph: Graph, preset: Quantization, bits: int = PREVIEW_BITS) -> Graph:
    """Quantise the LM head's product, which only chooses tokens, except for ``fp32``."""
    if preset == "fp32":
        return graph
    return quantize_symmetric(graph, bits=bits, block_size=PREVIEW_BLOCK_SIZE)


def quantize_symmetric(
    graph: Graph, *, bits: int, block_size: int, precise: Collection[int] = ()
) -> Graph:
    """Quantise every remaining product with ONNX Runtime's own quantiser.

    Those with an id in `precise` multiply inputs of 15 bits.
    """
    config = DefaultWeightOnlyQuantConfig(
        block_size=block_size, is_symmetric=True, bits=bits, quant_format=QuantFormat.QOperator
    )
    quantizer = DefaultWeightOnlyQuantizer(config)

    def product(node: NodeProto, x: str) -> NodeProto:
        pieces = graph.weights[node.input[1]].pieces()
        quantized = [
            quantizer.qbits_block_quant(np.ascontiguousarray(piece))[:2] for piece in pieces
        ]
        return quantized_product(
            graph,
            node,
            x,
            with_scale_rows(*joined(quantized)),
            K=graph.weights[node.input[1]].shape[0],
            bits=bits,
            block_size=block_size,
            accuracy_level=INT8_COMPUTE,
        )

    nodes: list[NodeProto] = []
    for node in graph.nodes:
        if not graph.is_product(node):
            nodes.append(node)
        elif id(node) in precise:
            nodes += precise_product(graph, node.input[0], partial(product, node))
        else:
            nodes.append(product(node, node.input[0]))
    graph.replace_nodes(nodes)
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


def quantize_affine(graph: Graph, precise: Collection[int], raised: frozenset[str]) -> None:
    """Quantise products with whole blocks on a grid, except for those of `raised`.

    Those with an id in `precise` multiply inputs of 15 bits.
    """
    extended: dict[str, str] = {}
    nodes: list[NodeProto] = []
    for node in graph.nodes:
        if not is_affine(graph, node, raised):
            nodes.append(node)
            continue
        name = node.input[0]
        grids, bits = product_grids(graph.weights[node.input[1]])
        if bits == 8 and not any(has_rest(grid) for grid in grids):
            multiply = partial(whole_grid_product, graph, node, grids)
        else:
            if name not in extended:
                extended[name] = name + WITH_MEANS
                nodes += with_means(name, extended[name])
            name = extended[name]
            weights = joined(grid_weights(grid, bits) for grid in grids)
            multiply = partial(grid_product, graph, node, weights, bits)
        if id(node) in precise:
            nodes += precise_product(graph, name, multiply)
        else:
            nodes.append(multiply(name))
    graph.replace_nodes(nodes)


def is_affine(graph: Graph, node: NodeProto, raised: frozenset[str]) -> bool:
    """Return whether `node` is a product with whole blocks that is not in `raised`."""
    if not graph.is_product(node):
        return False
    weight = graph.weights[node.input[1]]
    return weight.shape[0] % BLOCK_SIZE == 0 and raised.isdisjoint(weight.names)


def product_grids(weight: Weight) -> tuple[list[Grid], int]:
    """Return the grids of a weight's pieces and their bits: 8 where a piece needs them, or 4."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        grids = list(pool.map(coarse_grid, weight.pieces()))
        fitting = [grid for grid in grids if grid is not None]
        if len(fitting) == len(grids):
            return fitting, 4
        return list(pool.map(Grid.fit_bytes, weight.pieces())), 8


def coarse_grid(piece: Floats) -> Grid | None:
    """Return the grid of 16 steps of a piece, or None if it lies on a finer one."""
    return None if needs_bytes(piece) else Grid.fit(piece)


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


def grid_product(
    graph: Graph, product: NodeProto, weights: Sequence[Array], bits: int, extended: str
) -> NodeProto:
    """Return `product` as MatMulNBits on its weights' grid, with means in its input."""
    blocks = graph.weights[product.input[1]].shape[0] // BLOCK_SIZE
    return quantized_product(
        graph,
        product,
        extended,
        weights,
        K=blocks * (BLOCK_SIZE + REST_COLUMNS),
        bits=bits,
        block_size=BLOCK_SIZE,
        accuracy_level=INT8_COMPUTE,
    )


def whole_grid_product(
    graph: Graph, product: NodeProto, grids: Sequence[Grid], x: str
) -> NodeProto:
    """Return `product` as MatMulNBits of 8 bits on grids on which 0 is one of the steps."""
    weights = joined((grid.steps, grid.scale, zero_steps(grid, 255)) for grid in grids)
    return quantized_product(
        graph,
        product,
        x,
        weights,
        K=graph.weights[product.input[1]].shape[0],
        bits=8,
        block_size=BLOCK_SIZE,
        accuracy_level=INT8_COMPUTE,
    )


def zero_steps(grid: Grid, levels: int) -> Bytes:
    """Return the step next to 0 in each block [n, blocks]."""
    steps: Bytes = np.clip(np.rint(-grid.low / grid.scale), 0, levels).astype(np.uint8)
    return steps


def has_rest(grid: Grid) -> bool:
    """Return whether 0 is none of the 256 steps of some block."""
    rest = grid.low / grid.scale + zero_steps(grid, 255)
    return bool((np.abs(rest) > NO_REST).any())


def grid_weights(grid: Grid, bits: int) -> tuple[Bytes, Floats, Bytes]:
    """Return packed steps, scales and packed zeros of MatMulNBits, with the rest's columns."""
    n, blocks = grid.scale.shape
    middle = 1 << (bits - 1)  # the step that stands for 0 in the columns of the rest
    zero = zero_steps(grid, 2 * middle - 1)
    rest = (grid.low + zero * grid.scale) * BLOCK_SIZE
    columns, rest_scale = rest_columns(rest, middle)
    num_rest_blocks = -(-REST_COLUMNS * blocks // BLOCK_SIZE)
    num_padding = num_rest_blocks * BLOCK_SIZE - REST_COLUMNS * blocks
    padding = np.full((n, num_padding), middle, np.uint8)
    steps = np.concatenate([grid.steps.reshape(n, -1), *columns, padding], 1)
    rest_scales = np.repeat(rest_scale, num_rest_blocks, 1)
    scales = np.concatenate([grid.scale, rest_scales], 1)
    num_zeros = num_rest_blocks + (scales.shape[1] % 2 if bits == 4 else 0)
    rest_zeros = np.full((n, num_zeros), middle, np.uint8)
    zeros = np.concatenate([zero, rest_zeros], 1)
    if bits == 8:
        return steps.reshape(n, -1, BLOCK_SIZE), scales, zeros
    packed = pack_nibbles(steps).reshape(n, -1, BLOCK_SIZE // 2)
    return packed, scales, pack_nibbles(zeros)


def rest_columns(rest: Floats, middle: int) -> tuple[list[Bytes], Floats]:
    """Return rest [n, blocks] as columns of steps, uint8 [n, blocks] each, and a scale [n, 1]."""
    limit = REST_COLUMNS * (middle - 1)
    largest = np.abs(rest).max(1, keepdims=True)
    scale = np.maximum(largest / limit, np.finfo(np.float32).tiny).astype(np.float32)
    levels = np.rint(rest / scale).astype(np.int64) + REST_COLUMNS * middle
    columns = [((levels + i) // REST_COLUMNS).astype(np.uint8) for i in range(REST_COLUMNS)]
    return columns, scale


def pack_nibbles(values: Bytes) -> Bytes:
    """Pack pairs of values [n, even] below 16 into bytes [n, even / 2], the first one low."""
    packed: Bytes = values[:, 0::2] | (values[:, 1::2] << np.uint8(4))
    return packed


def product_weights(node: NodeProto) -> int:
    """Return the number of weights of a quantised product, without the columns of the rest."""
    sizes = {attribute.name: attribute.i for attribute in node.attribute}
    columns = sizes["K"]
    if node.input[0].removesuffix(PAIR).endswith(WITH_MEANS):
        columns -= columns * REST_COLUMNS // (BLOCK_SIZE + REST_COLUMNS)
    return int(columns * sizes["N"])


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
