"""Hidden states on their way up: in order, within the window, and again from wherever something is missing."""

from __future__ import annotations

import numpy as np
import pytest

from edge_agent.session.upload_buffer import UploadBuffer
from fleet.protocol.codec import unpack_chunk
from fleet.protocol.messages import ContextChunk, Opened

HIDDEN = 8
ROW_BYTES = 2 * HIDDEN
PATIENCE_S = 1.0


def rows(start: int, count: int) -> np.ndarray:
    return np.arange(start * HIDDEN, (start + count) * HIDDEN, dtype=np.float32).reshape(
        count, HIDDEN
    )


def outbox(
    num_rows: int,
    *,
    received: int = 0,
    chunk: int = 4096,
    window: int = 4096,
    dtypes: tuple[str, ...] = ("float16",),
) -> UploadBuffer:
    box = UploadBuffer(64, HIDDEN)
    box.add(rows(0, num_rows))
    box.begin(
        Opened(
            session="s1",
            worker="w1",
            received=received,
            max_chunk_bytes=chunk,
            window_bytes=window,
            dtypes=dtypes,
        )
    )
    return box


def sent(box: UploadBuffer, now: float = 0.0) -> list[ContextChunk]:
    """Everything that is due at `now`."""
    chunks = []
    while chunk := box.due(now, PATIENCE_S):
        chunks.append(chunk)
    return chunks


def spans(chunks: list[ContextChunk]) -> list[tuple[int, int]]:
    return [(chunk.start, chunk.start + chunk.count) for chunk in chunks]


def test_every_position_goes_once_in_chunks_that_the_worker_takes() -> None:
    chunks = sent(outbox(10, chunk=4 * ROW_BYTES))
    assert spans(chunks) == [(0, 4), (4, 8), (8, 10)]
    np.testing.assert_array_equal(
        np.concatenate([unpack_chunk(c, HIDDEN) for c in chunks]), rows(0, 10)
    )


def test_what_the_worker_has_already_is_not_sent() -> None:
    assert spans(sent(outbox(10, received=7))) == [(7, 10)]


def test_a_full_window_stops_until_something_is_acknowledged() -> None:
    box = outbox(10, chunk=2 * ROW_BYTES, window=4 * ROW_BYTES)
    assert spans(sent(box)) == [(0, 2), (2, 4)]
    box.acknowledge(3)
    assert spans(sent(box)) == [(4, 6), (6, 7)]
    box.acknowledge(7)
    assert spans(sent(box)) == [(7, 9), (9, 10)]


def test_a_window_that_stays_full_is_sent_again_from_what_was_acknowledged() -> None:
    box = outbox(10, chunk=2 * ROW_BYTES, window=4 * ROW_BYTES)
    box.acknowledge(1)
    assert spans(sent(box, now=5.0)) == [(1, 3), (3, 5)]
    assert sent(box, now=5.5) == []
    assert spans(sent(box, now=6.5)) == [(1, 3), (3, 5)]


def test_a_gap_is_mended_from_where_it_begins() -> None:
    box = outbox(6)
    sent(box)
    box.go_back(2)
    assert spans(sent(box)) == [(2, 6)]


def test_a_rewind_begins_another_branch_behind_what_is_kept() -> None:
    box = outbox(6)
    assert {chunk.branch for chunk in sent(box)} == {0}
    box.rewind(4)
    box.add(rows(20, 1))
    (chunk,) = sent(box)
    assert (chunk.branch, chunk.start) == (1, 4)
    np.testing.assert_array_equal(unpack_chunk(chunk, HIDDEN), rows(20, 1))


def test_another_worker_gets_everything_of_the_present_branch() -> None:
    box = outbox(6)
    sent(box)
    box.rewind(4)
    box.begin(
        Opened(
            session="s1",
            worker="w2",
            received=0,
            max_chunk_bytes=4096,
            window_bytes=4096,
            dtypes=("float16",),
        )
    )
    assert spans(sent(box)) == [(0, 4)]


def test_a_receipt_for_more_than_there_is_means_all_of_it() -> None:
    box = outbox(3)
    box.acknowledge(99)
    assert box.acknowledged == 3
    assert sent(box) == []


@pytest.mark.parametrize("value", [1e9, -1e9, 70000.0])
def test_what_fp16_cannot_hold_is_clipped(value: float) -> None:
    box = UploadBuffer(4, HIDDEN)
    box.add(np.full((1, HIDDEN), value, np.float32))
    box.begin(
        Opened(
            session="s1",
            worker="w1",
            received=0,
            max_chunk_bytes=4096,
            window_bytes=4096,
            dtypes=("float16",),
        )
    )
    (chunk,) = sent(box)
    assert np.abs(unpack_chunk(chunk, HIDDEN)).max() == np.finfo(np.float16).max
