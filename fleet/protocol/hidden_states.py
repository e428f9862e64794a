"""Hidden states as bytes: FP16, or int8 with each position's outliers stored separately.

A row of `int8` for a hidden size of h, little-endian, 36 + h bytes:

| bytes | content |
|---|---|
| 4 | float32 `scale` |
| 8 x 2 | uint16 indices of the eight values of largest magnitude |
| 8 x 2 | these values as float16 |
| h | int8; value = int8 x scale, except at those indices |

A language model's hidden states have a few dimensions that are hundreds of times larger than the
rest (LLM.int8(), arXiv 2208.07339); a single scale would round the others to zero. A row is coded
by itself: it has the same bytes in every chunk.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from fleet.errors import DecodeError

FLOAT16: Final = "float16"
INT8: Final = "int8"
TOKENS: Final = "tokens"
"""The `dtype` of a chunk that has token ids instead of hidden states."""
CONTEXT_DTYPES: Final = (FLOAT16, INT8)
NUM_OUTLIERS: Final = 8
MAX_INT8: Final = 127
MAX_FLOAT16: Final = np.finfo(np.float16).max

Float16 = npt.NDArray[np.float16]
Float32 = npt.NDArray[np.float32]


def row_bytes(hidden_size: int, dtype: str) -> int:
    """Return the bytes of one position."""
    return 2 * hidden_size if dtype == FLOAT16 else _row(hidden_size).itemsize


def to_float16(hidden_states: Float32) -> Float16:
    """Return hidden states in FP16. Values beyond its range are clipped."""
    return np.clip(hidden_states, -MAX_FLOAT16, MAX_FLOAT16).astype(np.float16)


def pack_rows(hidden_states: Float16, dtype: str) -> bytes:
    """Return hidden states [count, hidden] float16, all finite, as bytes."""
    if dtype == FLOAT16:
        return np.ascontiguousarray(hidden_states, dtype="<f2").tobytes()
    values = hidden_states.astype(np.float32)
    packed = np.zeros(len(values), _row(values.shape[1]))
    num_outliers = packed["index"].shape[1]
    by_magnitude = np.argpartition(-np.abs(values), num_outliers - 1, axis=1)
    index = by_magnitude[:, :num_outliers]
    packed["index"] = index
    packed["outlier"] = np.take_along_axis(values, index, 1)
    np.put_along_axis(values, index, 0.0, 1)
    packed["scale"] = np.abs(values).max(1) / MAX_INT8
    divisor = np.where(packed["scale"] > 0, packed["scale"], 1.0)
    packed["value"] = np.rint(values / divisor[:, None])
    return packed.tobytes()


def unpack_rows(data: bytes, count: int, hidden_size: int, dtype: str) -> Float16:
    """Return the hidden states [count, hidden_size] float16, read-only.

    Raises:
        DecodeError: the dtype is unknown, the number of bytes is wrong, an index is beyond the
            hidden size, or values are not finite.
    """
    if dtype not in CONTEXT_DTYPES:
        raise DecodeError(f"expected context in {' or '.join(CONTEXT_DTYPES)}, got {dtype[:20]!r}")
    num_bytes = count * row_bytes(hidden_size, dtype)
    if len(data) != num_bytes:
        raise DecodeError(
            f"expected {count} x {hidden_size} {dtype} values ({num_bytes} bytes), "
            f"got {len(data)} bytes"
        )
    rows = (
        np.frombuffer(data, "<f2").reshape(count, hidden_size)
        if dtype == FLOAT16
        else _from_int8(np.frombuffer(data, _row(hidden_size)), hidden_size)
    )
    if not np.isfinite(rows).all():
        raise DecodeError("context holds values that are not finite")
    rows.flags.writeable = False
    return rows


def _from_int8(packed: npt.NDArray[np.void], hidden_size: int) -> Float16:
    index = packed["index"].astype(np.int64)
    if (index >= hidden_size).any():
        raise DecodeError(f"context names dimension {index.max()} of {hidden_size}")
    with np.errstate(over="ignore", invalid="ignore"):
        rows: Float16 = (packed["value"] * packed["scale"][:, None]).astype(np.float16)
    np.put_along_axis(rows, index, packed["outlier"], 1)
    return rows


def _row(hidden_size: int) -> np.dtype[np.void]:
    outliers = min(NUM_OUTLIERS, hidden_size)
    return np.dtype(
        [
            ("scale", "<f4"),
            ("index", "<u2", outliers),
            ("outlier", "<f2", outliers),
            ("value", "i1", hidden_size),
        ]
    )
