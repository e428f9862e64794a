"""A fleet to measure on: one broker with TLS, the cloud's processes on one core, devices on another, links between."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, Self, TypeVar

import msgspec
import onnxruntime as ort
import torch

from benchmarks.drivers.answer import Answer, Stopwatch
from benchmarks.engines import Engine
from benchmarks.paper.cloud_side import BaselineSide, CloudSide, WorkerSide
from benchmarks.paper.models import PaperModels
from benchmarks.paper.rows import Link, Traffic
from benchmarks.paper.systems import SYSTEMS, Cloud, Device, System
from benchmarks.peers import peers
from benchmarks.processes import cpu_s, energy_j, started_on, two_cores
from cloud_broker_worker.broker.mosquitto import find_mosquitto
from edge_agent.engine.tokenizer import ChatTokenizer
from fleet.bundles.manifest import Bundle
from fleet.errors import ConfigError, FleetError
from fleet.identity.identity import Identity
from fleet.protocol.access import Role
from fleet.protocol.prompt import ChatMessage
from fleet.server.child_process import child
from fleet.server.home import EMBEDDED, MOSQUITTO, WORKER, FleetConfig, FleetHome
from fleet.server.supervisor import free_port, server_processes

HOST: Final = "127.0.0.1"
LOOPBACK: Final = Link()
QUIET_S: Final = 0.1  # without a byte on a link, beside its round trip
QUIET_TIMEOUT_S: Final = 20.0
ENDING_S: Final = 1.0  # from a connection that is reset to the end of the process behind it
PEER_NAMES: Final = {"llama.cpp": ("llama.cpp", "Q4_1"), "genai": ("onnxruntime-genai", "int4")}
WORKERS: Final[dict[Cloud, str]] = {
    "worker": WORKER,
    "whole": "cloud-whole",
    "upper": "cloud-upper",
    "llama.cpp": "cloud-llama-cpp",
    "genai": "cloud-genai",
}

Progress = Callable[[str], None]
T = TypeVar("T", int, float)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What an answer cost beside what the device says of it. `layer_positions` and `head_calls` are the cloud's."""

    edge_s: float
    cloud_s: float
    traffic: Traffic
    layer_positions: int
    head_calls: int
    joules: float | None


class Tallies(NamedTuple):
    """Of one system's link, device and cloud, since they were started."""

    bytes_up: int
    bytes_down: int
    messages_up: int
    messages_down: int
    layer_positions: int
    head_calls: int


class Rig:
    """Runs what `systems` need. Use as a context manager; every process ends with it."""

    def __init__(self, models: PaperModels, systems: Iterable[System], progress: Progress) -> None:
        self._models = models
        self._progress = progress
        self._systems = list(systems)
        self._stack = ExitStack()
        self._devices: dict[Device, Engine] = {}
        self._clouds: dict[Cloud, CloudSide] = {}
        self._links: dict[Device, Engine] = {}
        self._shapes: dict[Device, Link] = {}
        self._peers: dict[tuple[str, str], list[str]] = {}
        self._tokenizer = ChatTokenizer(models.bundle)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._start(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    # Processes.

    def _start(self, stack: ExitStack) -> None:
        cores = two_cores()
        if cores is None:
            self._progress(
                "this machine has no core for either side: both share what there is, and times say little"
            )
        edge_core, cloud_core = cores or (None, None)
        devices = list(dict.fromkeys(system.device for system in self._systems))
        clouds = list(dict.fromkeys(system.cloud for system in self._systems if system.cloud))
        if any(name in PEER_NAMES for name in (*devices, *clouds)):
            self._peers = peers(1, self._progress)
        whole = self._models.whole() if "whole" in clouds else None
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fleet-paper-")))
        bundle = str(self._models.bundle.folder)
        state = FleetHome.create(
            folder / "state",
            FleetConfig(host=HOST, port=free_port(HOST), bundle=bundle, service_port=0),
        )
        identities, workers = self._enroll(state, folder, devices, clouds)
        self._progress(f"starting {len(devices)} devices and {len(clouds)} clouds")
        with started_on(cloud_core):
            stack.enter_context(server_processes(state, broker=broker()))
            for device in identities:
                command = python("benchmarks.drivers.link", target=state.config.port)
                self._links[device] = stack.enter_context(Engine(f"the link of {device}", command))
            for cloud, identity in workers.items():
                self._clouds[cloud] = self._start_cloud(stack, cloud, identity, whole)
        for device, link in self._links.items():
            identity = identities[device]
            port = link.ask("port")["port"]
            Identity(identity.folder, msgspec.structs.replace(identity.config, port=port)).save()
        with started_on(edge_core):
            for device in devices:
                engine = Engine(
                    f"the device of {device}", self._device_command(device, identities), wait=False
                )
                self._devices[device] = stack.enter_context(engine)
        for side in self._clouds.values():
            side.wait_ready()
        for engine in self._devices.values():
            engine.wait_ready()

    def _enroll(
        self, state: FleetHome, folder: Path, devices: Iterable[Device], clouds: Iterable[Cloud]
    ) -> tuple[dict[Device, Identity], dict[Cloud, Identity]]:
        """Identities of all who speak to the broker: a peer's engine on the device's side does not."""
        own = [device for device in devices if device not in PEER_NAMES]
        names: dict[Cloud, str] = {cloud: WORKERS[cloud] for cloud in clouds}
        return (
            {
                device: state.enroll(f"edge-{i}", Role.DEVICE, folder / f"edge-{i}")
                for i, device in enumerate(own, 1)
            },
            {
                cloud: state.identity(name, Role.WORKER)
                if name == WORKER
                else state.enroll(name, Role.WORKER, folder / name)
                for cloud, name in names.items()
            },
        )

    def _start_cloud(
        self, stack: ExitStack, cloud: Cloud, identity: Identity, whole: Bundle | None
    ) -> CloudSide:
        bundle = self._models.bundle
        if cloud == "worker":
            arguments = (
                "run",
                str(identity.folder),
                "--bundle",
                str(bundle.folder),
                "--threads",
                "1",
            )
            process = child("the worker", "cloud_broker_worker", *arguments, "--metrics-port", "0")
            manifest = bundle.manifest
            return WorkerSide(
                stack.enter_context(process), manifest.model.num_layers - manifest.upload_layer
            )
        options: dict[str, Any] = {"identity": identity.folder, "bundle": bundle.folder}
        if whole and cloud == "whole":
            options |= {"bundle": whole.folder, "embedding": bundle.path("edge/embedding.npy")}
        elif cloud != "upper":
            options["peer"] = json.dumps(self._peers[PEER_NAMES[cloud]])
        command = python("benchmarks.drivers.cloud", **options)
        return BaselineSide(
            stack.enter_context(Engine(f"the cloud of {cloud}", command, wait=False))
        )

    def _device_command(self, device: Device, identities: dict[Device, Identity]) -> list[str]:
        if device in PEER_NAMES:
            return self._peers[PEER_NAMES[device]]
        options: dict[str, Any] = {
            "identity": identities[device].folder,
            "bundle": self._models.bundle.folder,
        }
        if device == "client":
            return python("benchmarks.drivers.client", **options)
        return python(
            "benchmarks.drivers.agent",
            **options,
            upload="int8" if device == "agent_int8" else "float16",
        )

    def cloud_pid(self, name: str) -> int:
        """The process that computes in a system's cloud."""
        system = SYSTEMS[name]
        if system.cloud is None:
            raise FleetError(f"{name} has no cloud")
        return self._clouds[system.cloud].pid

    # Answers.

    def answer(
        self, name: str, prompt: str, max_new_tokens: int, link: Link
    ) -> tuple[Answer, Cost]:
        """One answer of a system over a link, and what it cost.

        Raises:
            FleetError: a process failed or has ended, or the link is not quiet in time afterwards.
        """
        system = SYSTEMS[name]
        cloud = self._clouds[system.cloud] if system.cloud else None
        if cloud:
            cloud.check()
        try:
            self._shape(system.device, link)
            before = self._tallies(system)
            cpu_before = self._cpu_s(system)
            joules_before = energy_j()
            answer = self._ask(system, prompt, max_new_tokens)
            joules_after = energy_j()
            self._until_quiet(system, link)
            cpu_after = self._cpu_s(system)
            after = self._tallies(system)
        except (FleetError, OSError) as error:
            if cloud:
                check_for(
                    ENDING_S, cloud
                )  # that it has gone says more than what the device made of it
            raise FleetError(f"{name}: {error}") from error
        if cloud:
            cloud.check()  # the agent goes on without
        bytes_up, bytes_down, messages_up, messages_down, layer_positions, head_calls = minus(
            after, before
        )
        edge_s, cloud_s = minus(cpu_after, cpu_before)
        joules = (
            None if joules_before is None or joules_after is None else joules_after - joules_before
        )
        traffic = Traffic(bytes_up, bytes_down, messages_up, messages_down)
        return answer, Cost(
            edge_s=edge_s,
            cloud_s=cloud_s,
            traffic=traffic,
            layer_positions=layer_positions,
            head_calls=head_calls,
            joules=joules,
        )

    def _ask(self, system: System, prompt: str, max_new_tokens: int) -> Answer:
        device = self._devices[system.device]
        if system.device in PEER_NAMES:
            return self._ask_peer(device, prompt, max_new_tokens)
        options = dict(system.options)
        if system.device == "client" and system.cloud:
            options["worker"] = WORKERS[system.cloud]
        elif system.threshold is not None:
            options["thresholds"] = [system.threshold] * len(self._models.bundle.manifest.exits)
        answered = device.ask(system.op, prompt=prompt, max_new_tokens=max_new_tokens, **options)
        return msgspec.convert(answered, Answer)

    def _ask_peer(self, device: Engine, prompt: str, max_new_tokens: int) -> Answer:
        model = self._models.bundle.manifest.model
        prompt_ids = self._tokenizer.encode_chat([ChatMessage("user", prompt)])
        watch = Stopwatch()
        for line in device.stream("generate", prompt=prompt_ids, new_tokens=max_new_tokens):
            watch.add(line["token_id"], f"exit:{model.num_layers}")
        num_tokens = len(watch.token_ids)
        positions = len(prompt_ids) + num_tokens - 1
        return watch.answer(
            len(prompt_ids), layer_positions=positions * model.num_layers, head_calls=num_tokens
        )

    # Counts.

    def _shape(self, device: Device, link: Link) -> None:
        if device in self._links and self._shapes.get(device) != link:
            self._links[device].ask("shape", rtt_ms=link.rtt_ms, mbit_s=link.mbit_s)
            self._shapes[device] = link

    def _tallies(self, system: System) -> Tallies:
        """Nothing may be under way."""
        cloud = self._clouds[system.cloud] if system.cloud else None
        questioned = 0
        link = (0, 0, 0, 0)
        if proxy := self._links.get(system.device):
            counted = self._devices[system.device].ask("counts")
            num_bytes = proxy.ask("counts")
            link = (
                num_bytes["up"],
                num_bytes["down"],
                counted["messages_up"],
                counted["messages_down"],
            )
            questioned = counted.get("questioned", 0)
        return Tallies(*link, *(cloud.work(questioned) if cloud else (0, 0)))

    def _cpu_s(self, system: System) -> tuple[float, float]:
        """Seconds of CPU that device and cloud have taken."""
        cloud = self._clouds[system.cloud] if system.cloud else None
        return cpu_s(self._devices[system.device].pid), cpu_s(cloud.pid) if cloud else 0.0

    def _until_quiet(self, system: System, link: Link) -> None:
        """Returns when no byte has come for a while."""
        proxy = self._links.get(system.device)
        if proxy is None:
            return
        deadline = time.monotonic() + QUIET_TIMEOUT_S
        counted = proxy.ask("counts")
        while True:
            time.sleep(QUIET_S + 2 * link.rtt_ms / 1e3)
            if (again := proxy.ask("counts")) == counted:
                return
            if time.monotonic() > deadline:
                raise FleetError(
                    f"the link was not quiet within {QUIET_TIMEOUT_S:g} s after the answer"
                )
            counted = again


def minus(after: tuple[T, ...], before: tuple[T, ...]) -> Iterator[T]:
    """Item by item."""
    return (b - a for a, b in zip(before, after, strict=True))


def broker() -> str:
    """The kind of broker that is measured: mosquitto where it is installed, else the embedded one."""
    try:
        find_mosquitto()
    except ConfigError:
        return EMBEDDED
    return MOSQUITTO


def versions() -> dict[str, str]:
    """What a run is measured with, for `Run.versions`."""
    cores = two_cores()
    found = {
        "onnxruntime": ort.__version__,
        "torch": torch.__version__,
        "broker": broker(),
        "cores": f"device {cores[0]}, cloud {cores[1]}" if cores else "shared",
    }
    if found["broker"] == MOSQUITTO:
        said = subprocess.run(
            [find_mosquitto(), "-h"], capture_output=True, text=True, timeout=10, check=False
        ).stdout
        found["broker"] = said.partition("\n")[0].replace(" version", "") or MOSQUITTO
    return found


def python(module: str, **options: object) -> list[str]:
    """The command of one of our drivers."""
    given = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return [sys.executable, "-m", module, *given]


def check_for(seconds: float, cloud: CloudSide) -> None:
    """Raises FleetError as soon as it has ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        cloud.check()
        time.sleep(0.01)
