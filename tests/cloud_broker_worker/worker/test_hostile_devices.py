"""A device's requests while other devices try to keep the worker's memory and time."""

from __future__ import annotations

import pytest

from cloud_broker_worker.worker.session import SessionKey
from fleet.protocol.messages import Opened, Verified
from fleet.protocol.report import DeviceStatus
from tests.cloud_broker_worker.worker.conftest import Bench

NEIGHBOUR = "edge-1"
HOSTILE = ("edge-7", "edge-8", "edge-9")
OFFLINE = DeviceStatus(online=False, epoch=0)
LONG = 512  # positions, the tiny model's limit


def budget(bench: Bench, num_positions: int) -> int:
    shape = bench.engine.pool.shape
    return num_positions * (shape.cache_bytes + shape.hidden_bytes)


class Neighbour:
    """A device that requests a token every second; each must be the whole model's."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.rows = bench.upload(40)
        self.num_sent = 0
        self.steps: list[int] = []
        assert isinstance(bench.open("mine", NEIGHBOUR)[0], Opened)

    def token(self) -> None:
        position = len(self.steps) + 12
        new = self.rows[self.num_sent : position + 1]
        branch = self.bench.branch("mine", NEIGHBOUR)
        sent = self.bench.context(new, self.num_sent, "mine", NEIGHBOUR, branch)
        assert sent == []
        self.num_sent = position + 1
        self.bench.ask(position, len(self.steps), "mine", NEIGHBOUR)
        steps = 1
        while (message := self.bench.step().get(SessionKey(NEIGHBOUR, "mine"))) is None:
            steps += 1
            assert steps < 20
        assert isinstance(message, Verified), message
        expected = self.bench.expected_token(self.rows[: position + 1])
        assert message.token_id == expected
        self.steps.append(steps)


def test_opens_that_send_nothing_claim_no_memory(bench: Bench) -> None:
    bench.start(kv_budget_bytes=budget(bench, 2 * LONG))
    neighbour = Neighbour(bench)
    for second in range(12):
        bench.now += 1
        if second % 4 == 0:
            for i in range(19):
                bench.open(f"s{i}", HOSTILE[i % 3], max_positions=LONG)
        neighbour.token()
    assert bench.engine.pool.used_bytes <= budget(bench, 64)
    assert isinstance(bench.open("new", "edge-2")[0], Opened)
    assert bench.context(bench.upload(40), 0, "new", "edge-2") == []


def test_sessions_full_of_context_leave_a_device_within_its_share_its_memory(bench: Bench) -> None:
    bench.start(kv_budget_bytes=budget(bench, 2 * LONG))
    rows = bench.upload(LONG)
    neighbour = Neighbour(bench)
    for second in range(6):
        bench.now += 1
        for device in HOSTILE:
            for i in range(8):
                bench.open(f"s{i}", device, max_positions=LONG)
                bench.context(rows, 0, f"s{i}", device)
                bench.ask(LONG - 1, second, f"s{i}", device)
        neighbour.token()
        bench.engine.check_integrity()
    assert SessionKey(NEIGHBOUR, "mine") in bench.engine.sessions
    assert isinstance(bench.open("new", "edge-2")[0], Opened)
    assert bench.context(bench.upload(40), 0, "new", "edge-2") == []


def test_long_sessions_of_others_add_few_steps_and_short_ones(bench: Bench) -> None:
    neighbour = Neighbour(bench)
    rows = bench.upload(LONG)
    for i in range(8):
        bench.open(f"s{i}", HOSTILE[0], max_positions=LONG)
        bench.context(rows, 0, f"s{i}", HOSTILE[0])
        bench.ask(LONG - 1, 0, f"s{i}", HOSTILE[0], deadline_ms=600_000)
    for _ in range(10):
        before = bench.engine.counters.num_positions
        neighbour.token()
        num_positions = bench.engine.counters.num_positions - before
        assert num_positions <= 13 + 16 * neighbour.steps[-1]
    assert neighbour.steps == [2, *[1] * 9]  # its first request brings 13 positions
    alone = bench.engine.counters.num_positions
    bench.now += 11  # the neighbour is idle now, and the others have the whole worker
    bench.step()
    assert bench.engine.counters.num_positions - alone > 16


@pytest.mark.parametrize("returns", [False, True])
def test_a_device_that_has_gone_gets_no_steps_and_loses_its_sessions_unless_it_returns(
    bench: Bench, *, returns: bool
) -> None:
    rows = bench.upload(LONG)
    bench.open("s0", HOSTILE[0], max_positions=LONG)
    bench.context(rows, 0, "s0", HOSTILE[0])
    bench.ask(LONG - 1, 0, "s0", HOSTILE[0], deadline_ms=600_000)
    bench.engine.observe(HOSTILE[0], OFFLINE)
    assert bench.engine.step() is None
    bench.now += 5
    if returns:
        (opened,) = bench.open("s0", HOSTILE[0], max_positions=LONG)
        assert isinstance(opened, Opened)
        assert opened.received == LONG
    bench.now += 6
    bench.engine.expire()
    assert len(bench.engine.sessions) == int(returns)
