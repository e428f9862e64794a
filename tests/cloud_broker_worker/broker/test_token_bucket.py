"""The rate limit of a client's packets."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_broker_worker.broker.token_bucket import PacketBudget, TokenRate, spend_tokens

RATE = TokenRate(per_s=10.0, burst=20.0)


def test_a_burst_costs_no_time() -> None:
    assert spend_tokens(20.0, 0.0, 20.0, RATE) == (0.0, 0.0)


def test_a_debt_is_waited_for() -> None:
    assert spend_tokens(0.0, 0.0, 5.0, RATE) == (-5.0, 0.5)


def test_a_bucket_never_holds_more_than_a_burst() -> None:
    assert spend_tokens(15.0, 3600.0, 0.0, RATE) == (20.0, 0.0)


@given(st.lists(st.floats(0.0, 50.0), min_size=1, max_size=50))
def test_a_client_that_waits_as_told_spends_no_more_than_the_rate(costs: list[float]) -> None:
    now = 0.0
    budget = PacketBudget(RATE, lambda: now)
    for cost in costs:
        now += budget.spend(cost)
    assert sum(costs) <= RATE.burst + now * RATE.per_s + 1e-6


def test_connections_of_one_name_share_a_budget() -> None:
    budget = PacketBudget(RATE, lambda: 0.0)
    assert [budget.spend(10.0) for _ in range(3)] == pytest.approx([0.0, 0.0, 1.0])
