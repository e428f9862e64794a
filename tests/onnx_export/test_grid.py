"""Weights on the grids of llama.cpp's files are kept, and others are near theirs."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, dequantize, quantize
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from onnx_export.grid import BLOCK_SIZE, Grid, needs_bytes

Floats = NDArray[np.float32]
RNG = np.random.default_rng(11)
HALF_FLOATS = {Type.Q4_K: (0, 2), Type.Q5_K: (0, 2), Type.Q6_K: (208,)}
"""Places of the half floats in a super-block of 256 weights."""


def k_quants(kind: Type, n: int = 16, num_super_blocks: int = 4) -> Floats:
    """Return random weights [n, k] of a GGUF file with K-quants."""
    size = GGML_QUANT_SIZES[kind][1]
    data = RNG.integers(0, 256, (n, num_super_blocks, size), dtype=np.uint8)
    for start in HALF_FLOATS[kind]:
        halves = RNG.uniform(1e-4, 1e-3, (n, num_super_blocks, 1)).astype(np.float16)
        data[..., start : start + 2] = halves.view(np.uint8)
    weights: Floats = dequantize(data.reshape(n, -1), kind)
    return weights


def ulps(actual: Floats, expected: Floats) -> float:
    """Return the largest difference, in units of the last place of a block's largest weight."""
    largest = np.abs(expected.reshape(-1, BLOCK_SIZE)).max(-1)
    difference = np.abs(actual - expected).reshape(-1, BLOCK_SIZE).max(-1)
    return float((difference / np.spacing(np.maximum(largest, 1e-9))).max())


def test_q4_k_is_kept_in_four_bits() -> None:
    weight = k_quants(Type.Q4_K)
    grid = Grid.fit(weight.T)
    assert ulps(grid.weights.T, weight) <= 4
    assert grid.steps.max() <= 15
    assert not needs_bytes(weight.T)


@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q4_1])
def test_older_types_of_four_bits_are_kept_in_four_bits(kind: Type) -> None:
    normal = RNG.standard_normal((16, 256)).astype(np.float32)
    weight = dequantize(quantize(normal, kind), kind)
    assert ulps(Grid.fit(weight.T).weights.T, weight) <= 4
    assert not needs_bytes(weight.T)


@pytest.mark.parametrize("kind", [Type.Q5_0, Type.Q5_1, Type.Q8_0])
def test_finer_types_are_kept_in_eight_bits(kind: Type) -> None:
    normal = RNG.standard_normal((16, 256)).astype(np.float32)
    weight = dequantize(quantize(normal, kind), kind)
    assert needs_bytes(weight.T)
    assert ulps(Grid.fit_bytes(weight.T).weights.T, weight) <= 4


def test_q5_k_is_kept_in_eight_bits() -> None:
    weight = k_quants(Type.Q5_K)
    assert needs_bytes(weight.T)
    assert ulps(Grid.fit_bytes(weight.T).weights.T, weight) <= 4


def test_q6_k_has_eight_bits_that_are_nearer_than_its_own_steps() -> None:
    weight = k_quants(Type.Q6_K)
    assert needs_bytes(weight.T)
    grid = Grid.fit_bytes(weight.T)
    assert np.linalg.norm(grid.weights.T - weight) < 0.005 * np.linalg.norm(weight)


def test_weights_on_no_grid_do_not_need_eight_bits() -> None:
    assert not needs_bytes(RNG.standard_normal((256, 16)).astype(np.float32))
    assert not needs_bytes(np.zeros((64, 4), np.float32))


@pytest.mark.parametrize("offset", [0.0, 3.0, -40.0])
def test_eight_bits_hold_any_weights(offset: float) -> None:
    weight = RNG.standard_normal((256, 16)).astype(np.float32) + np.float32(offset)
    grid = Grid.fit_bytes(weight)
    steps = np.abs(grid.weights - weight).T.reshape(16, -1, BLOCK_SIZE).max(-1) / grid.scale
    assert steps.max() < 1.01


def test_many_blocks_have_the_grids_that_a_plain_loop_finds() -> None:
    weight = RNG.standard_normal((32 * 80, 48)).astype(np.float32)
    weight[:, ::2] = np.rint(weight[:, ::2] * 2).clip(-7, 7) / 2
    grid = Grid.fit(weight)
    blocks = np.ascontiguousarray(weight.T).reshape(48, -1, BLOCK_SIZE)
    scale, low = plain_fit(blocks)
    is_plain = np.abs(grid.scale - scale) == 0
    assert is_plain[1::2].all()  # on no grid: equal to the bit
    np.testing.assert_array_equal(grid.low[is_plain], low[is_plain])
    np.testing.assert_array_equal(grid.weights[:, ::2], weight[:, ::2])


def plain_fit(blocks: Floats) -> tuple[Floats, Floats]:
    """Return scale and low of blocks [n, blocks, 32]: four regressions, each kept if better."""
    low = blocks.min(-1)
    scale = (blocks.max(-1) - low) / 15
    best = (scale, low, *rounded(blocks, scale, low))
    for _ in range(4):
        mean = best[2].mean(-1)
        target = blocks.mean(-1)
        deviation = best[2] - mean[..., None]
        covariance = (deviation * (blocks - target[..., None])).sum(-1)
        scale = covariance / np.square(deviation).sum(-1)
        low = target - scale * mean
        steps, error = rounded(blocks, scale, low)
        is_better = error < best[3]
        best = (
            np.where(is_better, scale, best[0]),
            np.where(is_better, low, best[1]),
            np.where(is_better[..., None], steps, best[2]),
            np.where(is_better, error, best[3]),
        )
    return best[0], best[1]


def rounded(blocks: Floats, scale: Floats, low: Floats) -> tuple[Floats, Floats]:
    """Return the nearest steps and their squared error."""
    steps = np.clip(np.rint((blocks - low[..., None]) / scale[..., None]), 0, 15)
    weights = scale[..., None] * steps + low[..., None]
    error: Floats = np.square(weights - blocks).sum(-1)
    return steps, error
