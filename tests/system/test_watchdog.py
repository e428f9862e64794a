"""Real processes report that they are ready and get on; a process with a hung loop is silent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import pytest

from fleet.bundles.manifest import Bundle
from fleet.errors import FleetError
from fleet.protocol.access import Role
from fleet.protocol.prompt import ChatMessage, PromptRequest
from fleet.server.child_process import child
from fleet.server.home import WORKER, FleetConfig, FleetHome
from fleet.transport.mqtt import MqttTransport
from fleet.transport.prompt_client import PromptClient
from fleet.utils.service_manager import ALIVE, READY, STOPPING
from tests.brokers import HOST, free_port
from tests.service_manager import NotifySocket, notify_socket

WATCHDOG_S: Final = 8.0  # a message every two seconds or a little later
SILENCE_S: Final = 7.0
STOP_S: Final = 60.0
PROCESSES: Final = ("server", "worker", "device")

# Each script blocks one loop of a process a few seconds after the first cycle of that loop.
BLOCK: Final = """
import sys, time
{imports}
original = {function}
first = []
def block(*arguments, **options):
    first.append(time.monotonic())
    if first[-1] > first[0] + 3:
        time.sleep(3600)
    return original(*arguments, **options)
{function} = block
from {program} import main
main()
"""
LOOPS: Final = {
    "server's event loop": (
        "server",
        "from fleet.transport import threaded_server; from asyncio import wait_for",
        "threaded_server.asyncio.wait_for",
    ),
    "server's collector": (
        "server",
        "from fleet.server.collector_queue import CollectorQueue",
        "CollectorQueue.take",
    ),
    "server's changes": (
        "server",
        "from fleet.registry.audit import AuditLog",
        "AuditLog.newest_change",
    ),
    "worker's engine": (
        "worker",
        "from cloud_broker_worker.worker.engine import WorkerEngine",
        "WorkerEngine.step",
    ),
}
PROGRAMS: Final = {
    "server": "fleet.cli",
    "worker": "cloud_broker_worker.worker.cli",
    "device": "edge_agent.cli",
}


@pytest.fixture
def home(tmp_path: Path, tiny_bundle: Bundle) -> FleetHome:
    config = FleetConfig(
        host=HOST, port=free_port(), bundle=str(tiny_bundle.folder), service_port=free_port()
    )
    home = FleetHome.create(tmp_path / "home", config)
    home.enroll("kitchen", Role.DEVICE, tmp_path / "kitchen")
    return home


def arguments(home: FleetHome, process: str) -> list[str]:
    return {
        "server": ["server", "--home", str(home.folder)],
        "worker": ["run", str(home.folder / "identities" / WORKER), "--threads", "1"],
        "device": ["run", str(home.folder.parent / "kitchen")],
    }[process]


@contextmanager
def running(
    home: FleetHome, process: str, manager: NotifySocket, code: str
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process of the fleet by Python code, under a service manager."""
    started = subprocess.Popen(
        [sys.executable, "-c", code, *arguments(home, process)],
        env=os.environ | manager.environment(WATCHDOG_S),
        stdout=subprocess.DEVNULL,
    )
    try:
        yield started
    finally:
        started.kill()
        started.wait()


@contextmanager
def broker(home: FleetHome, process: str) -> Iterator[None]:
    """Run the server that a worker or a device needs."""
    if process == "server":
        yield
        return
    with child("the server", "fleet.cli", *arguments(home, "server")) as server:
        server.wait_ready()
        yield


@pytest.mark.parametrize("process", PROCESSES)
def test_a_process_reports_that_it_is_ready_alive_and_stopping(
    home: FleetHome, tmp_path: Path, process: str
) -> None:
    code = f"from {PROGRAMS[process]} import main; main()"
    with (
        broker(home, process),
        notify_socket(tmp_path) as manager,
        running(home, process, manager, code) as started,
    ):
        manager.wait_for(READY)
        for _ in range(2):
            manager.wait_for(ALIVE)
        started.send_signal(signal.SIGTERM)
        manager.wait_for(STOPPING)
        assert started.wait(STOP_S) == 0


@pytest.mark.parametrize("loop", LOOPS)
def test_a_process_with_a_loop_that_hangs_is_silent(
    home: FleetHome, tmp_path: Path, loop: str
) -> None:
    process, imports, function = LOOPS[loop]
    code = BLOCK.format(imports=imports, function=function, program=PROGRAMS[process])
    with (
        broker(home, process),
        notify_socket(tmp_path) as manager,
        running(home, process, manager, code) as started,
    ):
        assert ALIVE in manager.wait_for(ALIVE)
        manager.wait_silent(SILENCE_S)
        assert started.poll() is None


HANGING_MODEL: Final = """
import time
from fleet.graphs.partition import Partition
from edge_agent.update import supervisor
supervisor.MAX_LATE_S = 1.0
Partition.embed = lambda *arguments: time.sleep(3600)
from edge_agent.cli import main
main()
"""


def test_a_device_whose_model_hangs_is_silent_after_the_requests_deadline(
    home: FleetHome, tmp_path: Path
) -> None:
    request = PromptRequest(messages=(ChatMessage("user", "hello"),), deadline_ms=1000)
    with (
        broker(home, "device"),
        notify_socket(tmp_path) as manager,
        running(home, "device", manager, HANGING_MODEL),
        home.operator() as identity,
        MqttTransport.connect(identity) as link,
    ):
        manager.wait_for(READY)
        replies = PromptClient(link).ask("kitchen", request, timeout_s=2 * SILENCE_S)
        with suppress(FleetError):
            next(iter(replies))
        manager.wait_silent(SILENCE_S)
