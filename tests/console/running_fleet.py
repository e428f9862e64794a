"""A fleet over a real broker: `fleet server` with its console, two devices, two workers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from cloud_broker_worker.worker.config import WorkerConfig
from cloud_broker_worker.worker.worker import Worker
from edge_agent.config import AgentConfig
from edge_agent.reporting.report_outbox import REPORTS_FILE
from edge_agent.serving.agent import Agent
from fleet.bundles.manifest import Bundle
from fleet.identity.identity import Identity
from fleet.operator_api.operation import OperatorRole
from fleet.protocol import topics
from fleet.protocol.access import Role
from fleet.protocol.prompt import PromptRequest
from fleet.registry.rollouts.plan import RolloutPlan
from fleet.server.child_process import child
from fleet.server.console_address import console_url
from fleet.server.home import FleetConfig, FleetHome
from fleet.transport.base import Will
from fleet.transport.mqtt import MqttTransport
from fleet.transport.prompt_client import PromptClient
from tests.brokers import HOST, free_port, wait_until
from tests.console.web_client import WebClient, sign_in

WAIT_S: Final = 120.0
DEVICES = KITCHEN, CELLAR = "kitchen", "cellar"
AWAY: Final = "attic"
"""A device that is enrolled and never starts: the canary of the roll-out under way."""

WORKERS = WORKER, NEXT_WORKER = "cloud-1", "cloud-2"
APP: Final = "display"
NUM_ANSWERS: Final = 2
NUM_TOKENS: Final = 12


class RunningFleet:
    """The fleet, and the address of its console."""

    def __init__(self, folder: Path, bundle: Bundle, next_bundle: Bundle, stack: ExitStack) -> None:
        self._stack = stack
        self.folder = folder
        config = FleetConfig(
            host=HOST, port=free_port(), bundle=str(bundle.folder), service_port=free_port()
        )
        self.home = FleetHome.create(folder / "state", config)
        self.home.keep_bundle(bundle.folder)
        self.next_bundle_id = self.home.keep_bundle(next_bundle.folder)
        for name in (*DEVICES, AWAY):
            self.home.enroll(name, Role.DEVICE, folder / name, group="house")
        for name in WORKERS:
            self.home.enroll(name, Role.WORKER, folder / name)
        self.home.enroll(APP, Role.APP, folder / APP, allow=DEVICES)
        self.registry = stack.enter_context(self.home.registry("tests"))
        self.registry.identities.move(AWAY, "roof")
        arguments = ("server", "--home", str(self.home.folder), "--console", f"{HOST}:0")
        server = stack.enter_context(child("the server", "fleet.cli", *arguments))
        server.wait_ready()
        url = console_url(self.home.folder)
        assert url is not None
        self.url: str = url
        self.port = urlsplit(url).port or 0
        self._start_worker(WORKER, bundle)
        self._start_worker(NEXT_WORKER, next_bundle)
        self.agents = {name: self._start_device(name, bundle) for name in DEVICES}
        self.app = PromptClient(self._connect(APP))
        for name in DEVICES * NUM_ANSWERS:
            self.ask(name)
        wait_until(self._are_counted, "every answer is counted", WAIT_S)
        plan = RolloutPlan(canary_group="roof")
        self.registry.rollouts.start(self.next_bundle_id, plan)

    def _connect(self, name: str, will: Will | None = None) -> MqttTransport:
        identity = Identity.load(self.folder / name)
        return self._stack.enter_context(MqttTransport.connect(identity, will=will))

    def _start_worker(self, name: str, bundle: Bundle) -> None:
        link = self._connect(name, Will(topics.worker_status(name), Worker.will()))
        config = WorkerConfig(num_threads=1, shared_opens=False)
        self._stack.enter_context(Worker(link, bundle, config))

    def _start_device(self, name: str, bundle: Bundle) -> Agent:
        link = self._connect(name, Will(topics.device_status(name), Agent.will()))
        outbox = self.folder / name / REPORTS_FILE
        return self._stack.enter_context(Agent(link, bundle, AgentConfig(num_threads=1), outbox))

    def ask(self, device: str, prompt: str = "How warm is it?") -> str:
        """Return the text of an answer."""
        request = PromptRequest(prompt=prompt, max_new_tokens=NUM_TOKENS)
        return "".join(reply.text for reply in self.app.ask(device, request, timeout_s=WAIT_S))

    def _are_counted(self) -> bool:
        rows = self.registry.stats.per_device()
        counted = {row.device: row.generations for row in rows if row.generations}
        return counted == dict.fromkeys(DEVICES, NUM_ANSWERS)

    def client_of(self, name: str) -> WebClient:
        """Return a client that is signed in as an operator."""
        return sign_in(self.registry, name, self.port)

    def new_link(self, role: OperatorRole) -> str:
        """Return the address that signs an operator in once."""
        return f"{self.url}/sign-in?link={self.registry.operators.make_link(role.value).secret}"


@contextmanager
def running_fleet(folder: Path, bundle: Bundle, next_bundle: Bundle) -> Iterator[RunningFleet]:
    """Run the fleet; `next_bundle` is being rolled out, and waits for a device that is away."""
    with ExitStack() as stack:
        yield RunningFleet(folder, bundle, next_bundle, stack)
