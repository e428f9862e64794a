"""The recipes of docs/scaling.md and deploy/, step by step, from nothing to an answer."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from fleet.bundles.manifest import Bundle
from fleet.server.child_process import Child, running
from fleet.server.home import FleetHome
from tests.brokers import find_mosquitto
from tests.deploy.files import ROOT, compose
from tests.deploy.recipe import (
    State,
    compose_container,
    healthcheck,
    new_state,
    pod_containers,
    run_script,
    wait_for,
)
from tests.postgresql import Databases

PAGE: Final = (ROOT / "docs/scaling.md").read_text()
TIMEOUT_S: Final = 120.0
PROMPT: Final = "prompt kitchen 'How warm is it?' --threshold 1 --max-new-tokens 4 --json"


def blocks(heading: str) -> list[str]:
    """Return the blocks of commands after a heading in bold, up to the next one."""
    section = PAGE.split(f"**{heading}**")[1].split("\n\n**")[0]
    return re.findall(r"```sh\n(.*?)```", section, re.DOTALL)


@pytest.fixture
def state(tmp_path: Path, tiny_bundle: Bundle, postgresql: Databases) -> Iterator[State]:
    with postgresql.database(empty=True) as url:
        yield new_state(tmp_path, tiny_bundle.folder, url)


def join(folder: Path, enrolled: str) -> None:
    """Join with the line that `fleet enroll` has printed."""
    line = re.search(r"edge-agent join (\S+) --server (\S+)", enrolled)
    assert line
    command = [sys.executable, "-m", "edge_agent", "join", line[1], "--server", line[2]]
    subprocess.run([*command, "--out", str(folder)], timeout=TIMEOUT_S, check=True)


@contextmanager
def device(folder: Path) -> Iterator[None]:
    with running(Child("the device", ("edge_agent", "run", str(folder)))) as process:
        process.wait_ready()
        yield


def check_answer(output: str) -> None:
    answer: dict[str, Any] = json.loads(output.splitlines()[-1])
    assert answer["results"][0]["sources"] == {"cloud": 4}


# Compose.


class Site:
    """The services of Compose, started in the order of their dependencies."""

    def __init__(self, state: State, stack: ExitStack) -> None:
        self._state = state
        self._stack = stack
        self._started = {"postgres"}  # a server of the tests

    def up(self, name: str) -> None:
        """Start a service and those that it depends on, as `docker compose up` does."""
        if name in self._started:
            return
        self._started.add(name)
        conditions = compose()["services"][name].get("depends_on", {})
        for needed in conditions:
            self.up(needed)
        container = compose_container(self._state, name)
        if self._is_task(name):
            assert container.run() == 0
            return
        self._stack.enter_context(container.running())
        wait_for(lambda: healthcheck(self._state, name), f"{name} is healthy")

    @staticmethod
    def _is_task(name: str) -> bool:
        """Whether another service waits for the end of this one."""
        return {"condition": "service_completed_successfully"} in [
            service.get("depends_on", {}).get(name) for service in compose()["services"].values()
        ]


def test_the_containers_of_a_site_lead_from_nothing_to_an_answer(
    state: State, tmp_path: Path
) -> None:
    (script,) = blocks("One site, in containers")
    for example, value in {
        "fleet.example.org": state.server,
        "PASSWORD=...": "PASSWORD=secret",
        "/path/to/bundle": state.bundle,
    }.items():
        assert example in script
        script = script.replace(example, value)
    before, after = script.split("docker compose up -d\n")
    run_script(state, before, tmp_path)
    with ExitStack() as stack:
        site = Site(state, stack)
        for name in ("server", "worker-a", "worker-b"):
            site.up(name)
        enrolled = run_script(state, after, state.compose_folder)
        join(tmp_path / "kitchen", enrolled)
        stack.enter_context(device(tmp_path / "kitchen"))
        prompt = f"docker compose run --rm init {PROMPT}"
        check_answer(run_script(state, prompt, state.compose_folder))
        backup = re.search(r"`(docker compose run --rm init backup [^`]*)`", PAGE)
        assert backup
        run_script(state, backup[1], state.compose_folder)
    assert (state.compose_folder / "identities/fleet.tar.gz").stat().st_mode & 0o077 == 0
    assert FleetHome.load(state.volumes / "fleet").config.registry == state.database


# Kubernetes.


@pytest.mark.mosquitto
def test_the_pods_of_a_cluster_lead_from_nothing_to_an_answer(state: State, tmp_path: Path) -> None:
    first, second = blocks("A cluster")
    for example, value in {
        "mqtt.example.org": state.broker,
        "fleet.example.org": state.server,
        "PASSPHRASE=...": "PASSPHRASE=correct-horse",
        "0 1 2 3 4 5 6 7": "0 1",
    }.items():
        assert example in first
        first = first.replace(example, value)
    (operator,) = re.findall(r"^operator\(\).*$", first, re.MULTILINE)
    run_script(state, first, tmp_path)
    write_rights = f"{operator}\noperator fleet broker config --out /tmp/broker"
    with ExitStack() as stack:
        run_script(state, write_rights, tmp_path)  # a mosquitto stands for the cluster's broker
        config = state.volumes / "server/tmp/broker/mosquitto.conf"
        program = find_mosquitto("mosquitto")
        broker = Child("mosquitto", ("-c", str(config)), (program,))
        stack.enter_context(running(broker))
        broker.wait_listening(state.broker, 8883)
        stack.enter_context(pod_containers(state, "server", "server")["server"].running())
        enrolled = run_script(state, f"{operator}\n{second}", tmp_path)
        join(tmp_path / "kitchen", enrolled)
        run_script(state, write_rights, tmp_path)
        broker.process.send_signal(signal.SIGHUP)
        for pod in ("cloud-worker-0", "cloud-worker-1"):
            containers = pod_containers(state, "cloud-worker", pod)
            assert containers["identity"].run() == 0
            stack.enter_context(containers["worker"].running())
        stack.enter_context(device(tmp_path / "kitchen"))
        wait_for_worker(state, operator, tmp_path)
        check_answer(run_script(state, f"{operator}\noperator fleet {PROMPT}", tmp_path))
    assert FleetHome.load(state.volumes / "fleet").config.registry == state.database


def wait_for_worker(state: State, operator: str, folder: Path) -> None:
    """Wait until the fleet has a worker; its model loads for some seconds."""
    command = f"{operator}\noperator fleet workers --json"
    wait_for(lambda: '"online":true' in run_script(state, command, folder), "a worker is online")
