"""Twenty devices generate with the help of a worker; one of them is revoked, and is out, and no other notices."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from cloud_broker_worker.config import WorkerConfig
from cloud_broker_worker.worker import Worker
from edge_agent.agent import Agent
from edge_agent.config import AgentConfig
from fleet import topics
from fleet.access import Grants, Role
from fleet.client import PromptClient
from fleet.errors import FleetError, LinkError
from fleet.manifest import Bundle
from fleet.mqtt import MqttTransport
from fleet.prompt import PromptRequest
from fleet.registry.denials import Denials
from fleet.registry.watcher import ChangeWatcher
from fleet.transport import Will
from tests.brokers import BROKERS, wait_until
from tests.registered import RegisteredSite, registered_site

DEVICES = tuple(f"d{i}" for i in range(20))
REVOKED = "d7"
FLEET = (
    *(Grants(Role.DEVICE, name) for name in DEVICES),
    Grants(Role.APP, "a1", DEVICES),
    Grants(Role.WORKER, "w1"),
    Grants(Role.SERVER, "s1"),
)
OUT_S = 5.0
WAIT_S = 120.0
REQUEST = PromptRequest(prompt="How warm is it?", threshold=1.0, max_new_tokens=8)


class BusyFleet:
    """Twenty agents, a worker, and an app that asks each device again as soon as it has answered."""

    def __init__(self, site: RegisteredSite, bundle: Bundle, stack: ExitStack) -> None:
        self.answers: Counter[str] = Counter()
        self.connections: Counter[str] = Counter()
        self.errors: dict[str, str] = {}
        self._stop = threading.Event()
        server = stack.enter_context(site.connect("s1"))
        watcher = ChangeWatcher(site.registry)
        watcher.add(Denials(server, site.registry).publish)
        stack.enter_context(watcher)
        cloud = stack.enter_context(site.connect("w1", Will(topics.worker_status("w1"), Worker.will())))
        config = WorkerConfig(num_threads=1, shared_opens=False)
        self.worker = stack.enter_context(Worker(cloud, bundle, config))
        self.links: dict[str, MqttTransport] = {}
        for name in DEVICES:
            link = stack.enter_context(site.connect(name, Will(topics.device_status(name), Agent.will())))
            link.on_up(lambda name=name: self.connections.update([name]))  # type: ignore[misc]
            stack.enter_context(Agent(link, bundle, AgentConfig(num_threads=1)))
            self.links[name] = link
        client = PromptClient(stack.enter_context(site.connect("a1")))
        self._threads = [threading.Thread(target=self._ask, args=(client, name), daemon=True) for name in DEVICES]
        stack.callback(self._end)
        for thread in self._threads:
            thread.start()

    def _ask(self, client: PromptClient, name: str) -> None:
        while not self._stop.is_set():
            try:
                last = list(client.ask(name, REQUEST, timeout_s=WAIT_S if name != REVOKED else OUT_S))[-1]
            except FleetError as error:
                self.errors[name] = str(error)
                return
            if last.usage is None or set(last.usage.sources) != {"cloud"}:
                self.errors[name] = f"{last}"
            self.answers[name] += 1

    def _end(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(WAIT_S)


@pytest.fixture(params=BROKERS)
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RegisteredSite]:
    with registered_site(request.param, tmp_path, FLEET) as running:
        yield running


def test_one_of_twenty_busy_devices_is_revoked_and_out_within_five_seconds_and_the_others_go_on(
    site: RegisteredSite, tiny_bundle: Bundle
) -> None:
    others = [name for name in DEVICES if name != REVOKED]
    with ExitStack() as stack:
        fleet = BusyFleet(site, tiny_bundle, stack)
        wait_until(lambda: all(fleet.answers[name] for name in DEVICES), "every device has answered", WAIT_S)
        site.registry.revoke(REVOKED)
        revoked_at = time.monotonic()
        wait_until(lambda: not fleet.links[REVOKED].is_up, "it is disconnected", OUT_S)
        wait_until(
            lambda: REVOKED not in {key.device for key in list(fleet.worker.engine.sessions)}, "its session ends", OUT_S
        )
        assert time.monotonic() - revoked_at < OUT_S
        before = Counter(fleet.answers)
        wait_until(lambda: all(fleet.answers[name] >= before[name] + 2 for name in others), "they go on", WAIT_S)
        assert not fleet.links[REVOKED].is_up
        with suppress(LinkError), site.connect(REVOKED):
            pytest.fail("it was let in again")
    assert fleet.connections == dict.fromkeys(DEVICES, 1)
    assert set(fleet.errors) <= {REVOKED}
