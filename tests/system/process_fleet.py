"""A fleet over a real broker and TLS, whose every process and every link can be made to fail."""

from __future__ import annotations

import signal
import subprocess
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final, TypeAlias

import msgspec

from benchmarks.proxy import Proxy, Shape
from cloud_broker_worker.broker.mosquitto import write_config
from cloud_broker_worker.worker.config import WorkerConfig
from cloud_broker_worker.worker.worker import Worker
from edge_agent.config import AgentConfig
from edge_agent.reporting.report_outbox import REPORTS_FILE
from edge_agent.serving.agent import Agent
from fleet.bundles.manifest import Bundle
from fleet.identity.identity import Identity
from fleet.protocol import topics
from fleet.protocol.access import Role
from fleet.protocol.prompt import PromptRequest
from fleet.protocol.report import WorkerStatus, decode_status
from fleet.server.child_process import Child
from fleet.server.collector import Collector
from fleet.server.home import COLLECTOR, FleetConfig, FleetHome
from fleet.transport.base import Will
from fleet.transport.mqtt import MqttTransport
from fleet.transport.prompt_client import PromptClient
from tests.brokers import HOST, find_mosquitto, free_port, listens, wait_until
from tests.system.judge import first_turn, judge, next_turn, request
from tests.system.memory_fleet import Answer

WAIT_S: Final = 120.0
ANSWER_S: Final = 180.0
COUNT_S: Final = 60.0
DEVICES = DEVICE, NEIGHBOUR = "edge-1", "edge-2"
WORKERS = FIRST, SECOND = "cloud-1", "cloud-2"  # the state has a worker-1 of its own
APP: Final = "app-1"
ASKED: Final = request("How warm is it?", num_tokens=48)
FIRST_TURN: Final = first_turn("How warm is it?")
BESIDE: Final = request("Say something about rivers.", num_tokens=48)
SLOW: Final = Shape(
    latency_s=0.015
)  # the tiny model would have said all before anything could happen to it

Process: TypeAlias = "subprocess.Popen[Any]"


class ProcessFleet:
    """Start components one by one. Each has its own link to the broker, a `Proxy`, in `links`.

    `kind` is embedded (`fleet server` with its collector) or mosquitto with a collector here.
    """

    def __init__(self, kind: str, folder: Path, bundle: Bundle, stack: ExitStack) -> None:
        self.bundle = bundle
        self.emitted: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.online: set[str] = set()
        self._processes: dict[str, Process] = {}
        self._started: list[Process] = []
        self._kind = kind
        self._folder = folder
        self._stack = stack
        self._has_shared_subscriptions = kind == "mosquitto"
        port = free_port()
        self._home = FleetHome.create(
            folder / "state",
            FleetConfig(host=HOST, port=port, bundle=str(bundle.folder), service_port=0),
        )
        self.links = {
            name: stack.enter_context(Proxy(port))
            for name in (*DEVICES, *WORKERS, APP, "watcher", COLLECTOR)
        }
        for name in DEVICES:
            self.links[name].shape(SLOW)
        roles = dict.fromkeys(DEVICES, Role.DEVICE) | dict.fromkeys(WORKERS, Role.WORKER)
        self._identities = {name: self._enroll(name, role) for name, role in roles.items()}
        self._identities[APP] = self._enroll(APP, Role.APP, DEVICES)
        self._identities["watcher"] = self._enroll("watcher", Role.SERVER)
        self.registry = stack.enter_context(self._home.registry())
        stack.callback(self._end_processes)
        self.start_broker()
        if kind == "mosquitto":
            self._identities[COLLECTOR] = self._through_proxy(
                self._home.identity(COLLECTOR, Role.SERVER)
            )
            self._collecting = stack.enter_context(ExitStack())
            self.start_collector()
        watcher = self._connect("watcher")
        watcher.subscribe(topics.WORKER_STATUS_FILTER, self._on_status, qos=1)
        self.client = PromptClient(self._connect(APP))

    def _enroll(self, name: str, role: Role, allow: tuple[str, ...] = ()) -> Identity:
        return self._through_proxy(self._home.enroll(name, role, self._folder / name, allow=allow))

    def _through_proxy(self, identity: Identity) -> Identity:
        port = self.links[identity.name].port
        config = msgspec.structs.replace(
            identity.config, port=port, shared_subscriptions=self._has_shared_subscriptions
        )
        leading = Identity(identity.folder, config)
        leading.save()
        return leading

    def _connect(self, name: str, will: Will | None = None) -> MqttTransport:
        return self._stack.enter_context(MqttTransport.connect(self._identities[name], will=will))

    def _on_status(self, topic: str, payload: bytes) -> None:
        (name,) = topics.parse_topic(topic, topics.WORKER_STATUS_FILTER)
        if decode_status(payload, WorkerStatus).online:
            self.online.add(name)
        else:
            self.online.discard(name)

    # The broker.

    def start_broker(self) -> None:
        """Starts it, or starts it again; returns when it listens."""
        if self._kind == "embedded":
            self.broker = self._child(
                "the broker", "fleet.cli", "server", "--home", str(self._home.folder)
            )
            return
        names = (*DEVICES, *WORKERS, APP, "watcher", COLLECTOR)
        grants = [granted for name in names if (granted := self.registry.identities.grants(name))]
        port = self._home.config.port
        folder = self._folder / "mosquitto"
        config = write_config(folder, port, self._home.server_tls(), grants)
        self.broker = subprocess.Popen([find_mosquitto("mosquitto"), "-c", str(config)])
        self._started.append(self.broker)
        wait_until(lambda: self.broker.poll() is None and listens(port), "mosquitto listens")

    # The collector beside a mosquitto.

    def start_collector(self) -> None:
        link = self._collecting.enter_context(MqttTransport.connect(self._identities[COLLECTOR]))
        self._collecting.enter_context(Collector(link, self.registry))

    def stop_collector(self) -> None:
        self._collecting.close()

    # Workers and devices, in this process or in one of their own.

    @contextmanager
    def worker(self, name: str = FIRST, config: WorkerConfig | None = None) -> Iterator[Worker]:
        """One in this process; whatever happens, its books balance at the end."""
        config = msgspec.structs.replace(
            config or WorkerConfig(num_threads=1), shared_opens=self._has_shared_subscriptions
        )
        with MqttTransport.connect(
            self._identities[name], will=Will(topics.worker_status(name), Worker.will())
        ) as link:
            with Worker(link, self.bundle, config) as worker:
                self._until_online(name)
                yield worker
            worker.engine.check_integrity()
        self._until_offline(name)

    def worker_process(self, name: str = FIRST) -> Process:
        """One in a process of its own, started unless it runs."""
        process = self._processes.get(name)
        if process is None or process.poll() is not None:
            folder = str(self._folder / name)
            arguments = ("cloud_broker_worker", "run", folder, "--threads", "1")
            exact = ("--weights", "float32")
            process = self._processes[name] = self._child(name, *arguments, *exact)
            self._until_online(name)
        return process

    def kill(self, name: str) -> None:
        """SIGKILL to what was started as a process under that name, if it runs."""
        if process := self._processes.get(name):
            process.kill()
            process.wait()
            self._until_offline(name)

    @contextmanager
    def device(self, name: str = DEVICE, config: AgentConfig | None = None) -> Iterator[Agent]:
        """One in this process."""
        will = Will(topics.device_status(name), Agent.will())
        with (
            MqttTransport.connect(self._identities[name], will=will) as link,
            Agent(
                link,
                self.bundle,
                config or AgentConfig(num_threads=1),
                self._folder / name / REPORTS_FILE,
            ) as agent,
        ):
            yield agent

    def device_process(self, name: str = DEVICE, *launcher: str) -> Process:
        """Start a device as a process; `launcher` replaces the module ``edge_agent``."""
        arguments = (
            *(launcher or ("edge_agent",)),
            "run",
            str(self._folder / name),
            "--threads",
            "1",
        )
        self._processes[name] = self._child(name, *arguments)
        return self._processes[name]

    def _child(self, title: str, *arguments: str) -> Process:
        child = Child(title, arguments)
        self._started.append(child.process)
        child.wait_ready(WAIT_S)
        return child.process

    def _end_processes(self) -> None:
        for process in self._started:
            end(process)

    def _until_online(self, name: str) -> None:
        wait_until(lambda: name in self.online, f"{name} is online", WAIT_S)

    def _until_offline(self, name: str) -> None:
        wait_until(lambda: name not in self.online, f"{name} is offline", WAIT_S)

    # Answers, and what was counted of them.

    def ask(
        self,
        asked: PromptRequest,
        device: str = DEVICE,
        fault: Callable[[], None] | None = None,
        at: int = 4,
    ) -> Answer:
        """An answer, counted in `emitted`; `fault()` happens after its reply number `at`."""
        answer = Answer()
        for reply in self.client.ask(device, asked, timeout_s=ANSWER_S):
            answer.replies.append(reply)
            if reply.source:
                self.emitted[device][reply.source] += 1
            if fault and reply.seq == at:
                fault()
        return answer

    @contextmanager
    def neighbour_is_served(self, *, may_notice: bool = False) -> Iterator[None]:
        """Ask the neighbour meanwhile; its answer is right, undisturbed unless it may notice."""
        with ThreadPoolExecutor(1) as pool:
            beside = pool.submit(self.ask, BESIDE, NEIGHBOUR)
            yield
            answer = beside.result(ANSWER_S)
        judge(self.bundle, BESIDE, answer)
        assert may_notice or answer.last.note is None, answer.last.note

    def answer_through(
        self, fault: Callable[[], None], *, may_neighbour_notice: bool = False
    ) -> None:
        """A fault in the midst of an answer is noticed, and changes no token and no count.

        It is the second turn of a conversation, whose session continues that of the first.
        """
        first = self.ask(FIRST_TURN)
        judge(self.bundle, FIRST_TURN, first)
        asked = next_turn(FIRST_TURN, first, "And now?", num_tokens=48)
        with self.neighbour_is_served(may_notice=may_neighbour_notice):
            answer = self.ask(asked, fault=fault)
        judge(self.bundle, asked, answer)
        assert answer.last.note is not None, "the fault came too late to be noticed"
        self.check_counts()

    def check_counts(self) -> None:
        """Waits until the registry has counted what devices have emitted, and not a token more."""
        wait_until(
            lambda: self._counted() == self.emitted,
            f"the registry counts {dict(self.emitted)}",
            COUNT_S,
        )

    def _counted(self) -> dict[str, dict[str, int]]:
        return {row.device: row.sources for row in self.registry.stats.per_device() if row.tokens}


@contextmanager
def process_fleet(kind: str, folder: Path, bundle: Bundle) -> Iterator[ProcessFleet]:
    """A running broker with its registry; ends everything that was started, by its id."""
    with ExitStack() as stack:
        yield ProcessFleet(kind, folder, bundle, stack)


def end(process: Process) -> None:
    """Ends a process that may have ended, or been stopped, already."""
    if process.poll() is None:
        process.send_signal(signal.SIGCONT)
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()
    if process.stdout:
        process.stdout.close()
