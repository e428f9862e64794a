"""The fleet's HTTP API in front of real devices: counts by app, many clients, hang-ups."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import aiohttp
import pytest

from edge_agent.config import AgentConfig
from edge_agent.serving.agent import Agent
from fleet.bundles.manifest import Bundle
from tests.brokers import wait_until
from tests.fleet.server.gateway.api_fleet import APP, DEVICES, ApiFleet, api_fleet, chat
from tests.system.memory_fleet import WAIT_S, MemoryFleet, memory_fleet

NUM_CLIENTS: Final = 64
HANGS_UP: Final = 10  # every tenth client
CHAT: Final = "/v1/chat/completions"
ALONE: Final[dict[str, Any]] = {"mode": "standalone", "threshold": 1.0, "ignore_eos": True}


@pytest.fixture
def api(tmp_path: Path, ready_sqlite: Path) -> Iterator[ApiFleet]:
    database = Path(shutil.copy(ready_sqlite, tmp_path / "registry.sqlite"))
    with api_fleet(database) as started:
        yield started


def start_devices(api: ApiFleet, fleet: MemoryFleet, bundle: Bundle) -> list[Agent]:
    config = AgentConfig(num_threads=1, max_queued_requests=NUM_CLIENTS)
    agents = [fleet.start_device(bundle, config, name)[0] for name in DEVICES]
    for name in DEVICES:
        api.wait_online(name)
    return agents


async def stream(session: aiohttp.ClientSession, number: int) -> str | None:
    """Return the reason for the end of an answer; every tenth client hangs up after a token."""
    body = chat("fleet", stream=True, max_tokens=8, fleet=ALONE)
    async with session.post(CHAT, json=body) as response:
        assert response.status == 200, await response.text()
        if number % HANGS_UP == 0:
            await response.content.readline()
            response.close()
            return None
        lines = (await response.read()).splitlines()
    assert lines[-2] == b"data: [DONE]"
    return "length" if b'"finish_reason":"length"' in b"".join(lines) else "other"


def test_answers_are_complete_and_no_slot_leaks_while_clients_hang_up(
    api: ApiFleet, tiny_bundle: Bundle
) -> None:
    async def work() -> list[str | None]:
        async with api.session() as session:
            streams = (stream(session, number) for number in range(NUM_CLIENTS))
            return await asyncio.gather(*streams)

    with memory_fleet(api.broker) as fleet:
        agents = start_devices(api, fleet, tiny_bundle)
        ends = asyncio.run(work())
        expected = [None if number % HANGS_UP == 0 else "length" for number in range(NUM_CLIENTS)]
        assert ends == expected
        api.wait_idle()
        wait_until(lambda: all(agent.is_idle for agent in agents), "devices without a request")
        reports = [fleet.reports.get(timeout=WAIT_S) for _ in range(NUM_CLIENTS)]
    assert {report.app for report in reports} == {APP}
    cancelled = [report for report in reports if report.finish_reason == "cancelled"]
    assert len(cancelled) <= -(-NUM_CLIENTS // HANGS_UP)
    states = api.backend.directory.states(DEVICES)
    assert {state.num_asked for state in states.values()} == {0}


def test_a_device_reports_its_load(api: ApiFleet, tiny_bundle: Bundle) -> None:
    async def work() -> int:
        async with api.session() as session:
            body = chat("attic", stream=True, max_tokens=40, fleet=ALONE)
            async with session.post(CHAT, json=body) as response:
                await response.content.readline()
                state = api.backend.directory.states(["attic"])["attic"]
                await response.read()
                return state.num_running

    with memory_fleet(api.broker) as fleet:
        start_devices(api, fleet, tiny_bundle)
        assert asyncio.run(work()) == 1
        states = api.backend.directory.states
        wait_until(lambda: states(["attic"])["attic"].num_running == 0, "a device without load")
