"""The message faults that the fault tests inject."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.hostile import MAX_HELD_FOR, PERFECT, Mischief, Odds

MESSAGES = range(1000)


def arrivals(odds: Odds, seed: int = 0) -> list[int]:
    mischief: Mischief[int] = Mischief(seed, odds)
    return [arrived for message in MESSAGES for arrived in mischief(message)]


def test_without_odds_everything_arrives_in_order() -> None:
    assert arrivals(PERFECT) == list(MESSAGES)


def test_a_lost_message_never_arrives() -> None:
    arrived = arrivals(Odds(lost=0.2))
    assert arrived == sorted(set(arrived))
    assert 700 < len(arrived) < 900


def test_a_doubled_message_arrives_twice_in_a_row() -> None:
    counts = Counter(arrivals(Odds(doubled=0.2)))
    assert set(counts) == set(MESSAGES)
    assert set(counts.values()) == {1, 2}


def test_a_held_message_arrives_a_little_later() -> None:
    arrived = arrivals(Odds(held=0.2))
    late = [place - message for place, message in enumerate(arrived)]
    assert arrived != sorted(arrived)
    assert max(late) <= MAX_HELD_FOR
    assert len(set(arrived)) == len(arrived) >= len(MESSAGES) - MAX_HELD_FOR


def test_a_replayed_message_was_sent_before() -> None:
    mischief: Mischief[int] = Mischief(0, Odds(replayed=0.2))
    for message in MESSAGES:
        *old, new = mischief(message)
        assert new == message
        assert all(one <= message for one in old)
    assert mischief.num_done > 100


@pytest.mark.parametrize("seed", range(3))
def test_the_same_seed_does_the_same(seed: int) -> None:
    odds = Odds(0.1, 0.1, 0.1, 0.1)
    assert arrivals(odds, seed) == arrivals(odds, seed) != arrivals(odds, seed + 1)
