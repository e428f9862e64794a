"""Rows of the comparison of HTTP with MQTT, and the order in which the ways take turns."""

from __future__ import annotations

from functools import partial

from benchmarks.first_token import MQTT, NUM_WARM_UP, line, measure


def test_each_way_is_asked_once_a_round_and_each_is_the_first_one_in_turn() -> None:
    asked: list[str] = []

    def ask(name: str) -> float:
        asked.append(name)
        return len(asked) / 1e3

    ways = {name: partial(ask, name) for name in (MQTT, "device", "fleet")}
    taken_ms = measure(ways, rounds=4)
    rounds = [asked[number : number + 3] for number in range(0, len(asked), 3)]
    assert [each[0] for each in rounds[:4]] == [MQTT, "device", "fleet", MQTT]
    assert all(sorted(each) == sorted(ways) for each in rounds)
    assert [len(each) for each in taken_ms.values()] == [4, 4, 4]
    assert taken_ms[MQTT][0] > 3 * NUM_WARM_UP


def test_a_row_has_the_median_difference_within_a_round() -> None:
    row = line("HTTP", [10.0, 30.0, 21.0], [9.0, 10.0, 18.0])
    assert row.split() == ["HTTP", "21.00", "29.10", "+3.00"]
