"""The shares of sessions in a batch."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cloud_broker_worker.worker.scheduler import schedule


def test_every_session_runs_whole_when_there_is_room() -> None:
    assert schedule({"a": 5, "b": 1}, 8) == {"b": 1, "a": 5}


def test_a_long_prefill_takes_what_short_requests_leave() -> None:
    assert schedule({"long": 1000, "a": 1, "b": 2}, 100) == {"a": 1, "b": 2, "long": 97}


def test_two_long_prefills_share_the_batch() -> None:
    assert schedule({"a": 1000, "b": 1000}, 100) == {"a": 50, "b": 50}


def test_more_sessions_than_room_run_in_order_of_arrival() -> None:
    assert schedule({"first": 900, "second": 1, "third": 1}, 2).keys() == {"first", "second"}


def test_who_waits_for_nothing_does_not_run() -> None:
    assert schedule({"a": 0, "b": 3}, 8) == {"b": 3}


@given(st.dictionaries(st.integers(), st.integers(0, 2000)), st.integers(1, 600))
def test_a_batch_is_never_over_the_limit_never_empty_and_leaves_no_room_unused(
    pending: dict[int, int], max_positions: int
) -> None:
    batch = schedule(pending, max_positions)
    assert all(0 < count <= pending[key] for key, count in batch.items())
    assert sum(batch.values()) == min(max_positions, sum(pending.values()))
