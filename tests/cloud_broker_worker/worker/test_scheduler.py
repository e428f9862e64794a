"""The shares of devices and of their sessions in a batch."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cloud_broker_worker.worker.scheduler import Pending, fair_shares, position_cost, schedule
from cloud_broker_worker.worker.session import SessionKey


def pending(**counts: int) -> dict[SessionKey, Pending]:
    """Return the positions of sessions of one device."""
    return {SessionKey("edge-1", name): Pending(count) for name, count in counts.items()}


def scheduled(waiting: dict[SessionKey, Pending], max_units: int) -> dict[str, int]:
    return {key.session: count for key, count in schedule(waiting, max_units).items()}


def test_every_session_runs_whole_when_there_is_room() -> None:
    assert scheduled(pending(a=5, b=1), 8) == {"b": 1, "a": 5}


def test_a_long_prefill_takes_what_short_requests_leave() -> None:
    assert scheduled(pending(long=1000, a=1, b=2), 100) == {"a": 1, "b": 2, "long": 97}


def test_two_long_prefills_share_the_batch() -> None:
    assert scheduled(pending(a=1000, b=1000), 100) == {"a": 50, "b": 50}


def test_more_sessions_than_room_run_in_order_of_arrival() -> None:
    assert scheduled(pending(first=900, second=1, third=1), 2).keys() == {"first", "second"}


def test_a_session_that_waits_for_nothing_does_not_run() -> None:
    assert scheduled(pending(a=0, b=3), 8) == {"b": 3}


def test_a_device_with_many_sessions_gets_no_more_than_one_with_a_single_one() -> None:
    many = {SessionKey("edge-1", f"s{i}"): Pending(1000) for i in range(8)}
    batch = schedule(many | {SessionKey("edge-2", "s0"): Pending(1000)}, 80)
    assert batch[SessionKey("edge-2", "s0")] == 40
    assert sum(batch.values()) == 80


def test_positions_behind_a_long_context_count_as_several_and_one_always_runs() -> None:
    assert position_cost(100) == 1
    cost = position_cost(8000)
    assert cost == 8
    long = {SessionKey("edge-1", f"s{i}"): Pending(100, cost) for i in range(8)}
    assert sum(schedule(long, 32).values()) == 4
    assert schedule(long, 1) == {SessionKey("edge-1", "s0"): 1}


@given(st.dictionaries(st.integers(), st.integers(0, 2000)), st.integers(1, 600))
def test_shares_are_never_over_the_limit_never_empty_and_leave_no_room_unused(
    wanted: dict[int, int], room: int
) -> None:
    shares = fair_shares(wanted, room)
    assert all(0 < count <= wanted[key] for key, count in shares.items())
    assert sum(shares.values()) == min(room, sum(wanted.values()))


KEYS = st.builds(SessionKey, st.sampled_from(["a", "b", "c"]), st.sampled_from("stuvw"))
COUNTS = st.builds(Pending, st.integers(0, 2000), st.integers(1, 9))


@given(st.dictionaries(KEYS, COUNTS), st.integers(1, 600))
def test_a_batch_gives_no_session_too_much_and_some_session_something(
    waiting: dict[SessionKey, Pending], max_units: int
) -> None:
    batch = schedule(waiting, max_units)
    assert all(0 < count <= waiting[key].num_positions for key, count in batch.items())
    assert bool(batch) == any(each.num_positions for each in waiting.values())
    units = sum(count * waiting[key].cost for key, count in batch.items())
    assert units <= max_units + 3 * 9  # one position of each device runs in any case
