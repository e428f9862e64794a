"""A fleet to measure on: one broker with TLS, processes on separate cores, and links.

The cloud's processes run on one core, the devices on another.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Self

import msgspec
import onnxruntime as ort
import torch

from benchmarks.drivers.answer import DriverAnswer, Stopwatch
from benchmarks.engines import EngineProcess
from benchmarks.paper.cloud_side import BaselineSide, CloudSide, WorkerSide
from benchmarks.paper.models import GENAI, LLAMA_CPP, PaperModels
from benchmarks.paper.rows import Link, Traffic
from benchmarks.paper.systems import SYSTEMS, Cloud, Device, System
from benchmarks.processes import cpu_s, energy_j, started_on, two_cores
from cloud_broker_worker.broker.mosquitto import find_mosquitto
from edge_agent.engine.tokenizer import ChatTokenizer
from fleet.bundles.manifest import Bundle
from fleet.errors import ConfigError, FleetError
from fleet.identity.identity import Identity
from fleet.protocol.access import Role
from fleet.protocol.prompt import PromptRequest
from fleet.server.child_process import child
from fleet.server.home import EMBEDDED, MOSQUITTO, WORKER, FleetConfig, FleetHome
from fleet.server.supervisor import server_processes
from fleet.utils.host_address import free_port

HOST: Final = "127.0.0.1"
LOOPBACK: Final = Link()
QUIET_S: Final = 0.1  # without a byte on a link, in addition to its round trip
QUIET_TIMEOUT_S: Final = 20.0
ENDING_S: Final = 1.0  # from the reset of a connection to the end of its process
PEER_NAMES: Final = {"llama.cpp": LLAMA_CPP, "genai": GENAI}
WORKERS: Final[dict[Cloud, str]] = {
    "worker": WORKER,
    "whole": "cloud-whole",
    "upper": "cloud-upper",
    "llama.cpp": "cloud-llama-cpp",
    "genai": "cloud-genai",
}

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """An answer's cost in addition to the device's own figures.

    `layer_positions` and `head_calls` are the cloud's.
    """

    edge_s: float
    cloud_s: float
    traffic: Traffic
    layer_positions: int
    head_calls: int
    joules: float | None


@dataclass(frozen=True, kw_only=True)
class Tallies:
    """Counts of one system's link, device and cloud, since they were started."""

    bytes_up: int
    bytes_down: int
    messages_up: int
    messages_down: int
    layer_positions: int
    head_calls: int

    def since(self, before: Tallies) -> Tallies:
        """Return the counts since an earlier time."""
        earlier = asdict(before)
        return Tallies(**{name: count - earlier[name] for name, count in asdict(self).items()})


class Rig:
    """Runs the processes of `systems`. Use it as a context manager; every process ends with it."""

    def __init__(self, models: PaperModels, systems: Iterable[System], progress: Progress) -> None:
        self._models = models
        self._progress = progress
        self._systems = list(systems)
        self._stack = ExitStack()
        self._devices: dict[Device, EngineProcess] = {}
        self._clouds: dict[Cloud, CloudSide] = {}
        self._links: dict[Device, EngineProcess] = {}
        self._shapes: dict[Device, Link] = {}
        self._peers: dict[tuple[str, str], list[str]] = {}
        self._tokenizer = ChatTokenizer(models.bundle)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._start(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    # Processes.

    def _start(self, stack: ExitStack) -> None:
        cores = two_cores()
        if cores is None:
            self._progress(
                "this machine has no core for either side: "
                "both share the cores, and times mean little"
            )
        edge_core, cloud_core = cores or (None, None)
        devices = list(dict.fromkeys(system.device for system in self._systems))
        clouds = list(dict.fromkeys(system.cloud for system in self._systems if system.cloud))
        if any(name in PEER_NAMES for name in (*devices, *clouds)):
            self._peers = self._models.peers()
        whole = self._models.whole() if "whole" in clouds else None
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fleet-paper-")))
        bundle = str(self._models.bundle.folder)
        home = FleetHome.create(
            folder / "state",
            FleetConfig(host=HOST, port=free_port(HOST), bundle=bundle, service_port=0),
        )
        identities, workers = self._enroll(home, folder, devices, clouds)
        self._progress(f"starting {len(devices)} devices and {len(clouds)} clouds")
        with started_on(cloud_core):
            stack.enter_context(server_processes(home, broker=broker()))
            for device in identities:
                command = python("benchmarks.drivers.link", target=home.config.port)
                self._links[device] = stack.enter_context(
                    EngineProcess(f"the link of {device}", command)
                )
            for cloud, identity in workers.items():
                self._clouds[cloud] = self._start_cloud(stack, cloud, identity, whole)
        for device, link in self._links.items():
            identity = identities[device]
            port = link.ask("port")["port"]
            Identity(identity.folder, msgspec.structs.replace(identity.config, port=port)).save()
        with started_on(edge_core):
            for device in devices:
                engine = EngineProcess(
                    f"the device of {device}", self._device_command(device, identities), wait=False
                )
                self._devices[device] = stack.enter_context(engine)
        for side in self._clouds.values():
            side.wait_ready()
        for engine in self._devices.values():
            engine.wait_ready()

    def _enroll(
        self, home: FleetHome, folder: Path, devices: Iterable[Device], clouds: Iterable[Cloud]
    ) -> tuple[dict[Device, Identity], dict[Cloud, Identity]]:
        """Return the identities of all clients of the broker.

        A peer's engine on the device's side is not one.
        """
        own = [device for device in devices if device not in PEER_NAMES]
        names: dict[Cloud, str] = {cloud: WORKERS[cloud] for cloud in clouds}
        return (
            {
                device: home.enroll(f"edge-{i}", Role.DEVICE, folder / f"edge-{i}")
                for i, device in enumerate(own, 1)
            },
            {
                cloud: home.identity(name, Role.WORKER)
                if name == WORKER
                else home.enroll(name, Role.WORKER, folder / name)
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
                "--weights",
                "float32",
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
            stack.enter_context(EngineProcess(f"the cloud of {cloud}", command, wait=False))
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
        """Return the process that computes in a system's cloud."""
        system = SYSTEMS[name]
        if system.cloud is None:
            raise FleetError(f"{name} has no cloud")
        return self._clouds[system.cloud].pid

    # Answers.

    def move(self, name: str, split: int) -> None:
        """Let the device of a system hold `split` layers from the next answer on."""
        self._devices[SYSTEMS[name].device].ask("move", split=split)

    def answer(
        self, name: str, prompt: str, max_new_tokens: int, link: Link
    ) -> tuple[DriverAnswer, Cost]:
        """Return one answer of a system over a link, and its cost.

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
                check_for(ENDING_S, cloud)  # its end explains more than the device's error
            raise FleetError(f"{name}: {error}") from error
        if cloud:
            cloud.check()  # the agent continues without it
        tallies = after.since(before)
        edge_s, cloud_s = (b - a for a, b in zip(cpu_before, cpu_after, strict=True))
        joules = (
            None if joules_before is None or joules_after is None else joules_after - joules_before
        )
        traffic = Traffic(
            bytes_up=tallies.bytes_up,
            bytes_down=tallies.bytes_down,
            messages_up=tallies.messages_up,
            messages_down=tallies.messages_down,
        )
        return answer, Cost(
            edge_s=edge_s,
            cloud_s=cloud_s,
            traffic=traffic,
            layer_positions=tallies.layer_positions,
            head_calls=tallies.head_calls,
            joules=joules,
        )

    def _ask(self, system: System, prompt: str, max_new_tokens: int) -> DriverAnswer:
        device = self._devices[system.device]
        if system.device in PEER_NAMES:
            return self._ask_peer(device, prompt, max_new_tokens)
        options = dict(system.options)
        if system.device == "client" and system.cloud:
            options["worker"] = WORKERS[system.cloud]
        elif system.threshold is not None:
            options["thresholds"] = [system.threshold] * len(self._models.bundle.manifest.exits)
        answered = device.ask(system.op, prompt=prompt, max_new_tokens=max_new_tokens, **options)
        return msgspec.convert(answered, DriverAnswer)

    def _ask_peer(self, device: EngineProcess, prompt: str, max_new_tokens: int) -> DriverAnswer:
        model = self._models.bundle.manifest.model
        prompt_ids = self._tokenizer.encode(PromptRequest(prompt=prompt))
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
        """Return the counts; no answer may be in progress."""
        cloud = self._clouds[system.cloud] if system.cloud else None
        proxy = self._links.get(system.device)
        counts: dict[str, int] = {}
        num_bytes = {"up": 0, "down": 0}
        if proxy is not None:
            counts = self._devices[system.device].ask("counts")
            num_bytes = proxy.ask("counts")
        work = cloud.work(counts.get("questioned", 0)) if cloud else (0, 0)
        return Tallies(
            bytes_up=num_bytes["up"],
            bytes_down=num_bytes["down"],
            messages_up=counts.get("messages_up", 0),
            messages_down=counts.get("messages_down", 0),
            layer_positions=work[0],
            head_calls=work[1],
        )

    def _cpu_s(self, system: System) -> tuple[float, float]:
        """Return the seconds of CPU of device and cloud."""
        cloud = self._clouds[system.cloud] if system.cloud else None
        return cpu_s(self._devices[system.device].pid), cpu_s(cloud.pid) if cloud else 0.0

    def _until_quiet(self, system: System, link: Link) -> None:
        """Return when no byte has come for a while."""
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


def broker() -> str:
    """Return the kind of broker: mosquitto where it is installed, else the embedded one."""
    try:
        find_mosquitto()
    except ConfigError:
        return EMBEDDED
    return MOSQUITTO


def versions() -> dict[str, str]:
    """Return the versions of the tools of a run, for `Run.versions`."""
    cores = two_cores()
    tools = {
        "onnxruntime": ort.__version__,
        "torch": torch.__version__,
        "broker": broker(),
        "cores": f"device {cores[0]}, cloud {cores[1]}" if cores else "shared",
    }
    if tools["broker"] == MOSQUITTO:
        output = subprocess.run(
            [find_mosquitto(), "-h"], capture_output=True, text=True, timeout=10, check=False
        ).stdout
        tools["broker"] = output.partition("\n")[0].replace(" version", "") or MOSQUITTO
    return tools


def python(module: str, **options: object) -> list[str]:
    """Return the command of one of our drivers."""
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return [sys.executable, "-m", module, *arguments]


def check_for(seconds: float, cloud: CloudSide) -> None:
    """Watch a process; raise FleetError as soon as it has ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        cloud.check()
        time.sleep(0.01)
