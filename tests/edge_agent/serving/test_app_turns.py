"""The queue that serves apps in turn."""

from __future__ import annotations

from edge_agent.serving.app_turns import AppTurns


def test_an_app_with_many_items_delays_another_app_by_one() -> None:
    turns: AppTurns[int] = AppTurns()
    for item in (1, 2, 3):
        turns.put("many", item)
    turns.put("one", 4)
    turns.close()
    assert [turns.get() for _ in range(5)] == [1, 4, 2, 3, None]
