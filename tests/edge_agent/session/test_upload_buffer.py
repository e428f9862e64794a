"""The upload of hidden states: in order, within the window, and again from wherever something is
missing.
"""

from __future__ import annotations

import numpy as np
import pytest
from msgspec.structs import replace

from edge_agent.session.upload_buffer import UploadBuffer
from fleet.protocol.codec import TOKEN_BYTES, unpack_chunk, unpack_tokens
from fleet.protocol.messages import ContextChunk, Opened

HIDDEN = 8
ROW_BYTES = 2 * HIDDEN
PATIENCE_S = 1.0


def rows(start: int, count: int) -> np.ndarray:
    return np.arange(start * HIDDEN, (start + count) * HIDDEN, dtype=np.float32).reshape(
        count, HIDDEN
    )


OPENED = Opened(
    session="s1",
    worker="w1",
    received=0,
    max_chunk_bytes=4096,
    window_bytes=4096,
    dtypes=("float16",),
)


def filled_buffer(
    num_rows: int,
    *,
    received: int = 0,
    chunk: int = 4096,
    window: int = 4096,
    dtypes: tuple[str, ...] = ("float16",),
) -> UploadBuffer:
    buffer = UploadBuffer(64, HIDDEN)
    buffer.add(rows(0, num_rows))
    buffer.begin(
        Opened(
            session="s1",
            worker="w1",
            received=received,
            max_chunk_bytes=chunk,
            window_bytes=window,
            dtypes=dtypes,
        )
    )
    return buffer


def sent(buffer: UploadBuffer, now: float = 0.0) -> list[ContextChunk]:
    """Everything that is due at `now`."""
    chunks = []
    while chunk := buffer.next_chunk(now, PATIENCE_S):
        chunks.append(chunk)
    return chunks


def spans(chunks: list[ContextChunk]) -> list[tuple[int, int]]:
    return [(chunk.start, chunk.start + chunk.count) for chunk in chunks]


def test_every_position_goes_once_in_chunks_that_the_worker_takes() -> None:
    chunks = sent(filled_buffer(10, chunk=4 * ROW_BYTES))
    assert spans(chunks) == [(0, 4), (4, 8), (8, 10)]
    np.testing.assert_array_equal(
        np.concatenate([unpack_chunk(c, HIDDEN) for c in chunks]), rows(0, 10)
    )


def test_each_chunk_has_its_tokens_also_after_a_rewind() -> None:
    size = 4 * (ROW_BYTES + TOKEN_BYTES)
    buffer = UploadBuffer(64, HIDDEN, has_tokens=True)
    buffer.add(rows(0, 10), range(10))
    buffer.begin(replace(OPENED, max_chunk_bytes=size, window_bytes=4096))
    chunks = sent(buffer)
    assert spans(chunks) == [(0, 4), (4, 8), (8, 10)]
    assert [unpack_tokens(chunk, 99) for chunk in chunks] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9],
    ]
    buffer.rewind(8)
    buffer.add(rows(8, 2), [70, 71])
    assert [unpack_tokens(chunk, 99) for chunk in sent(buffer)] == [[70, 71]]


def test_what_the_worker_has_already_is_not_sent() -> None:
    assert spans(sent(filled_buffer(10, received=7))) == [(7, 10)]


def test_a_full_window_stops_until_something_is_acknowledged() -> None:
    buffer = filled_buffer(10, chunk=2 * ROW_BYTES, window=4 * ROW_BYTES)
    assert spans(sent(buffer)) == [(0, 2), (2, 4)]
    buffer.acknowledge(3)
    assert spans(sent(buffer)) == [(4, 6), (6, 7)]
    buffer.acknowledge(7)
    assert spans(sent(buffer)) == [(7, 9), (9, 10)]


def test_a_window_that_stays_full_is_sent_again_from_what_was_acknowledged() -> None:
    buffer = filled_buffer(10, chunk=2 * ROW_BYTES, window=4 * ROW_BYTES)
    buffer.acknowledge(1)
    assert spans(sent(buffer, now=5.0)) == [(1, 3), (3, 5)]
    assert sent(buffer, now=5.5) == []
    assert spans(sent(buffer, now=6.5)) == [(1, 3), (3, 5)]


def test_a_gap_is_mended_from_where_it_begins() -> None:
    buffer = filled_buffer(6)
    sent(buffer)
    buffer.go_back(2)
    assert spans(sent(buffer)) == [(2, 6)]


def test_a_rewind_begins_another_branch_behind_what_is_kept() -> None:
    buffer = filled_buffer(6)
    assert {chunk.branch for chunk in sent(buffer)} == {0}
    buffer.rewind(4)
    buffer.add(rows(20, 1))
    (chunk,) = sent(buffer)
    assert (chunk.branch, chunk.start) == (1, 4)
    np.testing.assert_array_equal(unpack_chunk(chunk, HIDDEN), rows(20, 1))


def test_another_worker_gets_everything_of_the_present_branch() -> None:
    buffer = filled_buffer(6)
    sent(buffer)
    buffer.rewind(4)
    buffer.begin(
        Opened(
            session="s1",
            worker="w2",
            received=0,
            max_chunk_bytes=4096,
            window_bytes=4096,
            dtypes=("float16",),
        )
    )
    assert spans(sent(buffer)) == [(0, 4)]


def test_a_receipt_for_more_than_there_is_means_all_of_it() -> None:
    buffer = filled_buffer(3)
    buffer.acknowledge(99)
    assert buffer.acknowledged == 3
    assert sent(buffer) == []


@pytest.mark.parametrize("value", [1e9, -1e9, 70000.0])
def test_what_fp16_cannot_hold_is_clipped(value: float) -> None:
    buffer = UploadBuffer(4, HIDDEN)
    buffer.add(np.full((1, HIDDEN), value, np.float32))
    buffer.begin(
        Opened(
            session="s1",
            worker="w1",
            received=0,
            max_chunk_bytes=4096,
            window_bytes=4096,
            dtypes=("float16",),
        )
    )
    (chunk,) = sent(buffer)
    assert np.abs(unpack_chunk(chunk, HIDDEN)).max() == np.finfo(np.float16).max
