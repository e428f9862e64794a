"""The fleet's HTTP API in front of real devices: counts by app, many clients, hang-ups."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import aiohttp
import pytest

from edge_agent.config import AgentConfig
from edge_agent.serving.agent import Agent
from fleet.bundles.manifest import Bundle
from fleet.protocol.prompt import ChatMessage, PromptRequest
from tests.api.device_api import hang_up, wait_without_requests
from tests.brokers import wait_until
from tests.fleet.server.gateway.api_fleet import APP, DEVICES, ApiFleet, api_fleet, chat
from tests.system.memory_fleet import WAIT_S, MemoryFleet, memory_fleet

NUM_CLIENTS: Final = 64
HANGS_UP: Final = 10  # every tenth client
SHORT: Final = 8
LONG: Final = 400  # tokens
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


def text_of(lines: list[bytes]) -> str:
    """The text of a stream's events."""
    events = [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
    choices = [choice for event in events for choice in event["choices"]]
    return "".join(choice["delta"].get("content", "") for choice in choices)


async def ask(session: aiohttp.ClientSession, agents: list[Agent], number: int) -> str | None:
    """Return the text of an answer; every tenth client hangs up after a token."""
    hangs_up = number % HANGS_UP == 0
    messages = [{"role": "user", "content": f"Number {number}"}]
    max_tokens = LONG if hangs_up else SHORT
    body = chat("fleet", messages=messages, stream=True, max_tokens=max_tokens, fleet=ALONE)
    async with session.post(CHAT, json=body) as response:
        assert response.status == 200, await response.text()
        if hangs_up:
            while b"source" not in await response.content.readline():
                pass
            loop = asyncio.get_running_loop()
            close = partial(loop.call_soon_threadsafe, response.close)
            await asyncio.to_thread(hang_up, agents, close)
            return None
        lines = (await response.read()).splitlines()
    assert lines[-2] == b"data: [DONE]"
    return text_of(lines)


def text_alone(fleet: MemoryFleet, number: int) -> str:
    """The text of an answer over MQTT, while no other is active."""
    options: dict[str, Any] = ALONE | {"max_new_tokens": SHORT}
    message = ChatMessage("user", f"Number {number}")
    return fleet.ask(PromptRequest(messages=(message,), **options), device=DEVICES[0]).text


def test_of_64_clients_each_gets_its_text_while_some_hang_up(
    api: ApiFleet, tiny_bundle: Bundle
) -> None:
    async def work(agents: list[Agent]) -> list[str | None]:
        async with api.session() as session:
            return await asyncio.gather(*(ask(session, agents, i) for i in range(NUM_CLIENTS)))

    with memory_fleet(api.broker) as fleet:
        agents = start_devices(api, fleet, tiny_bundle)
        alone = [text_alone(fleet, number) for number in range(NUM_CLIENTS)]
        answers = asyncio.run(work(agents))
        api.wait_idle()
        for agent in agents:
            wait_without_requests(agent)
        reports = [fleet.reports.get(timeout=WAIT_S) for _ in range(2 * NUM_CLIENTS)][NUM_CLIENTS:]
    assert answers == [None if i % HANGS_UP == 0 else text for i, text in enumerate(alone)]
    assert {report.app for report in reports} == {APP}
    reasons = Counter(report.finish_reason for report in reports)
    assert reasons == {"length": 57, "cancelled": 7}
    assert not api.backend._open
    states = api.backend.directory.states(DEVICES)
    assert {state.num_asked for state in states.values()} == {0}


def test_a_key_that_is_revoked_in_mid_stream_frees_its_place(
    api: ApiFleet, tiny_bundle: Bundle
) -> None:
    def revoke() -> None:
        api.registry.api_keys.revoke(api.key.split("-")[1])
        api.follow()

    async def work(agents: list[Agent]) -> list[bytes]:
        body = chat("kitchen", stream=True, max_tokens=LONG, fleet=ALONE)
        async with api.session() as session, session.post(CHAT, json=body) as response:
            while b"source" not in await response.content.readline():
                pass
            await asyncio.to_thread(hang_up, agents, revoke)
            return (await response.read()).splitlines()

    with memory_fleet(api.broker) as fleet:
        agents = start_devices(api, fleet, tiny_bundle)
        lines = asyncio.run(work(agents))
        api.wait_idle()
        for agent in agents:
            wait_without_requests(agent)
    assert b"the key was revoked" in lines[-2]
    assert b"data: [DONE]" not in lines


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
