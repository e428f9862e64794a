"""Turns are given in the order of asking."""

from __future__ import annotations

import threading

import pytest

from edge_agent.engine.fair_lock import FairLock

WAIT_S = 30.0


def start_waiting(turns: FairLock, name: str, order: list[str]) -> threading.Thread:
    """A thread that waits for a turn, once it does, and then notes its name."""

    def take() -> None:
        with turns:
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
    with turns:
        threads = [start_waiting(turns, name, order) for name in ("first", "second", "third")]
        assert order == []
    with turns:
        order.append("again")
    for thread in threads:
        thread.join(WAIT_S)
    assert order == ["first", "second", "third", "again"]


def test_an_error_gives_the_turn_back() -> None:
    turns = FairLock()
    with pytest.raises(ValueError, match="mine"), turns:
        raise ValueError("mine")
    with turns:
        assert turns.num_waiting == 0
