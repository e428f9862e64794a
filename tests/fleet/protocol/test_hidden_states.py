"""Hidden states in int8: what is kept, how small it is, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.errors import DecodeError
from fleet.protocol.hidden_states import (
    CONTEXT_DTYPES,
    INT8,
    NUM_OUTLIERS,
    Float16,
    pack_rows,
    row_bytes,
    unpack_rows,
)

HIDDEN = 576


def hidden_states(num_rows: int, seed: int = 0, hidden: int = HIDDEN) -> Float16:
    """Ordinary values around 1 and a few dimensions far out, as in a language model."""
    random = np.random.default_rng(seed)
    rows = random.normal(size=(num_rows, hidden))
    rows[:, :3] *= 300
    return rows.astype(np.float16)


def test_int8_takes_about_half_the_bytes_of_float16() -> None:
    assert row_bytes(HIDDEN, INT8) == 36 + HIDDEN
    assert len(pack_rows(hidden_states(5), INT8)) == 5 * (36 + HIDDEN)


def test_outliers_come_back_as_they_were_and_the_rest_within_half_a_step() -> None:
    rows = hidden_states(20)
    back = unpack_rows(pack_rows(rows, INT8), 20, HIDDEN, INT8)
    order = np.argsort(-np.abs(rows), axis=1)
    outliers = order[:, :NUM_OUTLIERS]
    rest = order[:, NUM_OUTLIERS:]
    np.testing.assert_array_equal(
        np.take_along_axis(back, outliers, 1), np.take_along_axis(rows, outliers, 1)
    )
    kept, got = (np.take_along_axis(x, rest, 1).astype(np.float32) for x in (rows, back))
    step = np.abs(kept).max(1, keepdims=True) / 127
    assert (np.abs(got - kept) <= 0.51 * step + 1e-3).all()


@given(st.integers(0, 5), st.integers(1, 6))
def test_a_row_has_the_same_bytes_in_every_chunk(start: int, count: int) -> None:
    rows = hidden_states(12)
    size = row_bytes(HIDDEN, INT8)
    whole = pack_rows(rows, INT8)
    assert (
        pack_rows(rows[start : start + count], INT8) == whole[start * size : (start + count) * size]
    )


@pytest.mark.parametrize(
    "rows", [np.zeros((2, 16)), np.full((2, 16), 65504.0), np.full((2, 16), -6e-8)]
)
def test_rows_of_one_value_come_back(rows: np.ndarray) -> None:
    values = rows.astype(np.float16)
    back = unpack_rows(pack_rows(values, INT8), 2, 16, INT8)
    np.testing.assert_allclose(back.astype(np.float32), values.astype(np.float32), rtol=0.01)


@pytest.mark.parametrize("hidden", [1, 7, 8, 9])
def test_a_narrow_model_travels_too(hidden: int) -> None:
    rows = hidden_states(3, hidden=hidden)
    for dtype in CONTEXT_DTYPES:
        back = unpack_rows(pack_rows(rows, dtype), 3, hidden, dtype)
        np.testing.assert_allclose(back.astype(np.float32), rows.astype(np.float32), atol=0.05)


def altered(position: int, value: bytes) -> bytes:
    data = bytearray(pack_rows(hidden_states(1), INT8))
    data[position : position + len(value)] = value
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (pack_rows(hidden_states(1), INT8)[:-1], "got 611 bytes"),
        (pack_rows(hidden_states(2), INT8), "expected 1 x 576 int8 values .612 bytes., got 1224"),
        (altered(4, b"\x40\x02"), "names dimension 576 of 576"),
        (altered(0, b"\x00\x00\x80\x7f"), "not finite"),
        (altered(0, b"\xff\xff\x7f\x7f"), "not finite"),
        (altered(20, b"\x00\x7e"), "not finite"),
    ],
    ids=["cut", "too long", "index", "infinite scale", "huge scale", "outlier that is no number"],
)
def test_bytes_that_are_no_hidden_states_are_refused(data: bytes, reason: str) -> None:
    with pytest.raises(DecodeError, match=reason):
        unpack_rows(data, 1, HIDDEN, INT8)
