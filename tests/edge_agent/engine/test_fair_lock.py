"""Turns are given in the order of asking."""

from __future__ import annotations

import threading

import pytest

from edge_agent.engine.fair_lock import FairLock

WAIT_S = 30.0


def start_waiting(
    turns: FairLock, name: str, order: list[str], user: str = "user"
) -> threading.Thread:
    """A thread that waits for a turn of `user`, once it does, and then notes its name."""

    def take() -> None:
        with turns.of(user):
            order.append(name)

    before = turns.num_waiting
    thread = threading.Thread(target=take, daemon=True)
    thread.start()
    while turns.num_waiting == before:
        thread.join(0.001)
    return thread


def test_who_lets_go_and_asks_again_comes_after_those_who_wait() -> None:
    turns = FairLock()
    order = list[str]()
    with turns.of("user"):
        threads = [start_waiting(turns, name, order) for name in ("first", "second", "third")]
        assert order == []
    with turns.of("user"):
        order.append("again")
    for thread in threads:
        thread.join(WAIT_S)
    assert order == ["first", "second", "third", "again"]


def test_an_error_gives_the_turn_back() -> None:
    turns = FairLock()
    with pytest.raises(ValueError, match="mine"), turns.of("user"):
        raise ValueError("mine")
    with turns.of("user"):
        assert turns.num_waiting == 0
    assert turns.is_free


def test_users_take_turns_however_many_threads_each_has() -> None:
    turns = FairLock()
    order = list[str]()
    with turns.of("one"):
        threads = [start_waiting(turns, f"one-{i}", order, "one") for i in range(4)]
        threads += [start_waiting(turns, f"two-{i}", order, "two") for i in range(2)]
        threads.append(start_waiting(turns, "three", order, "three"))
    for thread in threads:
        thread.join(WAIT_S)
    assert order == ["two-0", "three", "one-0", "two-1", "one-1", "one-2", "one-3"]
