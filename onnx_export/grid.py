"""Grids of weights: a scale and an offset for each block of weights of one output.

Blocks are columns of an array [size, blocks] here, so that each operation runs along all blocks. A
part of the blocks stays in a core's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from onnx_export.graph_weights import Floats

Bytes = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.intp]

BLOCK_SIZE: Final = 32
SMALL_BLOCK_SIZE: Final = 16
LEVELS: Final = 15
BYTE_LEVELS: Final = 255
NUM_REFINEMENTS: Final = 4
CHUNK_BLOCKS: Final = 2048
NUM_DIVISORS: Final = 4
"""Steps that the least distance of two weights of a block may have."""
SAMPLE_BLOCKS: Final = 32
"""Blocks, at most, that show whether to look for the grids of the others in the cache."""
ROUGH_TOLERANCE: Final = 0.02
TOLERANCE: Final = 1e-3
"""Distance from a grid, in steps, of weights that lie on it."""
ZERO_TOLERANCE: Final = 2e-5
SAMPLE_OUTPUTS: Final = 8
LEAST_SHARE: Final = 0.9


@dataclass(frozen=True)
class Grid:
    """Weights ``scale * steps + low``.

    `steps` uint8 [n, blocks, size] from 0 to 15 or 255; `scale` and `low` float32 [n, blocks].
    """

    steps: Bytes
    scale: Floats
    low: Floats

    @classmethod
    def fit(cls, weight: Floats) -> Grid:
        """Return the grid of 16 steps of weight [k, n], in blocks of 32.

        Weights that lie on such a grid are kept, whether or not they reach its ends. For other
        blocks it is near the grid of the least squared error.
        """
        return cls._of_blocks(weight, fitted_columns)

    @classmethod
    def fit_bytes(cls, weight: Floats) -> Grid:
        """Return the grid of 256 steps of weight [k, n], in blocks of 32.

        Weights that lie on such a grid are kept. For other blocks 0 is one of the steps.
        """
        return cls._of_blocks(weight, bytes_columns)

    @classmethod
    def _of_blocks(cls, weight: Floats, fit: Callable[[Floats], Columns]) -> Grid:
        n = weight.shape[1]
        blocks = weight.T.reshape(-1, BLOCK_SIZE)
        steps = np.empty(blocks.shape, np.uint8)
        scale = np.empty(len(blocks), np.float32)
        low = np.empty(len(blocks), np.float32)
        for part in parts(len(blocks)):
            columns = fit(np.ascontiguousarray(blocks[part].T))
            steps[part] = columns.steps.T
            scale[part] = columns.scale
            low[part] = columns.low
        return cls(steps.reshape(n, -1, BLOCK_SIZE), scale.reshape(n, -1), low.reshape(n, -1))

    @property
    def weights(self) -> Floats:
        """The weights of the grid, float32 [k, n]."""
        values: Floats = self.scale[..., None] * self.steps + self.low[..., None]
        return values.reshape(len(values), -1).T


@dataclass(frozen=True)
class Columns:
    """A grid of blocks that are columns: whole `steps` float32 [size, m], `scale`, `low` [m]."""

    steps: Floats
    scale: Floats
    low: Floats

    @classmethod
    def round(cls, values: Floats, scale: Floats, low: Floats, levels: int = LEVELS) -> Columns:
        """Return the nearest steps of `values` on a grid; a scale that is not positive is 1."""
        scale = np.where(scale > 0, scale, np.float32(1))
        steps = values - low
        steps /= scale
        np.clip(np.rint(steps, out=steps), 0, levels, out=steps)
        return cls(steps, scale, low)

    def errors(self, values: Floats) -> Floats:
        """Return the signed distances from `values`."""
        errors = self.scale * self.steps
        errors += self.low
        errors -= values
        return errors

    def squared_error(self, values: Floats) -> Floats:
        """Return the sum of the squared distances of each block [m]."""
        errors = self.errors(values)
        return column_sum(np.square(errors, out=errors))

    def regression(self, centred: Floats, mean: Floats) -> tuple[Floats, Floats]:
        """Return scale and low of the least squared error for these steps.

        `centred` are the values less their `mean`.
        """
        mean_step = column_sum(self.steps) / np.float32(len(self.steps))
        deviation = self.steps - mean_step
        covariance = column_sum(deviation * centred)
        variance = column_sum(np.square(deviation, out=deviation))
        slope = covariance / np.where(variance > 0, variance, np.float32(1))
        scale = np.where(slope > 0, slope, self.scale)
        return scale, mean - scale * mean_step

    def replace(self, where: Indices, other: Columns) -> None:
        """Replace the blocks at the indices `where` in place."""
        self.steps[:, where] = other.steps
        self.scale[where] = other.scale
        self.low[where] = other.low

    def merge(self, other: Columns, where: Mask) -> None:
        """Replace the blocks with a true element of `where` in place."""
        np.copyto(self.steps, other.steps, where=where)
        np.copyto(self.scale, other.scale, where=where)
        np.copyto(self.low, other.low, where=where)

    def take(self, where: Indices) -> Columns:
        """Return the blocks at the indices `where`."""
        return Columns(self.steps.take(where, 1), self.scale[where], self.low[where])


def parts(num_blocks: int) -> Iterator[slice]:
    """Yield slices of blocks that stay in a core's cache."""
    for start in range(0, num_blocks, CHUNK_BLOCKS):
        yield slice(start, start + CHUNK_BLOCKS)


def column_sum(values: Floats) -> Floats:
    """Return the sum over the rows, a multiple of 8, in the order of NumPy's sum of a row."""
    sums = values[:8] + values[8:16]
    for start in range(16, len(values), 8):
        sums += values[start : start + 8]
    while len(sums) > 1:
        sums = sums[0::2] + sums[1::2]
    total: Floats = sums[0]
    return total


def fitted_columns(values: Floats) -> Columns:
    """Return a grid of 16 steps for blocks [32, m]: their own one, or a near one."""
    low = values.min(0)
    best = Columns.round(values, (values.max(0) - low) / np.float32(LEVELS), low)
    least = best.squared_error(values)
    refine(values, best, least, NUM_REFINEMENTS)
    return keep_grids(values, best, least)


def refine(values: Floats, best: Columns, least: Floats, num_steps: int) -> None:
    """Replace grids of blocks and their errors by better ones in place, step by step."""
    mean = column_sum(values) / np.float32(len(values))
    centred = values - mean
    for step in range(num_steps, 0, -1):
        refined = Columns.round(values, *best.regression(centred, mean))
        error = refined.squared_error(values)
        is_better = error < least
        best.merge(refined, is_better)
        np.copyto(least, error, where=is_better)
        active = np.flatnonzero(is_better)
        if 2 * len(active) < len(is_better):
            # A block whose error this step did not lessen would not change in the next one.
            part = best.take(active)
            error = least[active]
            refine(values.take(active, 1), part, error, step - 1)
            best.replace(active, part)
            least[active] = error
            return


def keep_grids(values: Floats, fitted: Columns, error: Floats) -> Columns:
    """Replace blocks of `fitted` that lie on another grid of 16 steps in place; return all."""
    is_exact = error <= len(values) * np.square(TOLERANCE * fitted.scale)
    others = np.flatnonzero(~is_exact)
    sample = others[:: len(others) // SAMPLE_BLOCKS + 1]
    if np.isnan(find_columns(values.take(sample, 1), LEVELS).scale).all():
        return fitted
    found = find_columns(values.take(others, 1), LEVELS)
    is_found = np.flatnonzero(np.isfinite(found.scale))
    fitted.replace(others[is_found], found.take(is_found))
    return fitted


def bytes_columns(values: Floats) -> Columns:
    """Return a grid of 256 steps for blocks [32, m]: their own one, or from least to largest."""
    low: Floats = np.minimum(values.min(0), np.float32(0))
    span: Floats = np.maximum(values.max(0), np.float32(0)) - low
    scale = np.where(span > 0, span / np.float32(BYTE_LEVELS), np.float32(1))
    low = np.rint(low / scale) * scale
    nearest = Columns.round(values, scale, low, BYTE_LEVELS)
    found = find_columns(values, BYTE_LEVELS)
    nearest.merge(found, np.isfinite(found.scale))
    return nearest


def needs_bytes(weight: Floats) -> bool:
    """Return whether weight [k, n] lies on a grid of more than 16 and at most 256 steps.

    The first outputs are a sample. The blocks of such a grid have 32 weights, as in llama.cpp's
    Q5_0, Q5_K and Q8_0, or 16, as in its Q6_K.
    """
    sample = np.ascontiguousarray(weight[:, :SAMPLE_OUTPUTS].T)
    is_coarse = lies_on_grid(sample, BLOCK_SIZE, LEVELS)
    sizes = (BLOCK_SIZE, SMALL_BLOCK_SIZE)
    return not is_coarse and any(lies_on_grid(sample, size, BYTE_LEVELS) for size in sizes)


def lies_on_grid(weights: Floats, block_size: int, levels: int) -> bool:
    """Return whether nearly all blocks of weights [n, k] lie on a grid of these levels."""
    blocks = np.ascontiguousarray(weights.reshape(-1, block_size).T)
    found = np.isfinite(find_columns(blocks, levels).scale)
    return float(found.mean()) >= LEAST_SHARE


def find_columns(values: Floats, levels: int) -> Columns:
    """Return the grids on which blocks [size, m] lie; the scale of a block on none is NaN.

    The least distance of two weights is a small multiple of a step. 0 is one of the steps of a
    grid without an offset, also where all weights of a block have one sign.
    """
    ordered = np.sort(values, axis=0)
    low = ordered[0]
    gaps = np.diff(ordered, axis=0)
    span = ordered[-1] - low
    np.copyto(gaps, np.inf, where=gaps <= span * np.float32(TOLERANCE / levels))
    gap = gaps.min(0)
    gap = np.where(np.isfinite(gap), gap, np.float32(1))
    found = Columns(np.zeros_like(values), np.full_like(low, np.nan), np.zeros_like(low))
    active = np.arange(values.shape[1])
    for divisor in range(1, NUM_DIVISORS + 1):
        part = values.take(active, 1)
        scale = (gap[active] / divisor).astype(np.float32)
        columns = Columns.round(part, scale, low[active], levels)
        is_near = is_on_grid(columns, part, ROUGH_TOLERANCE)
        near = np.flatnonzero(is_near)
        exact = exact_columns(columns.take(near), part.take(near, 1), levels)
        found.replace(active[near], exact)
        active = active[~is_near]
    return found


def is_on_grid(columns: Columns, values: Floats, tolerance: float) -> Mask:
    """Return which blocks [m] have all values within `tolerance` steps of their grid."""
    errors = columns.errors(values)
    mask: Mask = np.abs(errors, out=errors).max(0) <= tolerance * columns.scale
    return mask


def exact_columns(columns: Columns, values: Floats, levels: int) -> Columns:
    """Return the grids again by regression in double precision, with a 0 on a step.

    A scale is NaN where a block does not lie on its grid.
    """
    double = values.astype(np.float64)
    mean = double.mean(0)
    scale, low = columns.regression(double - mean, mean)
    offset = low / scale
    whole = np.rint(offset)
    offset = np.where(np.abs(offset - whole) < ZERO_TOLERANCE, whole, offset)
    shift = np.clip(whole, 0, levels - columns.steps.max(0))
    steps = columns.steps + shift.astype(np.float32)
    low = (offset - shift) * scale
    exact = Columns(steps, scale.astype(np.float32), low.astype(np.float32))
    exact.scale[~is_on_grid(exact, values, TOLERANCE)] = np.nan
    return exact
