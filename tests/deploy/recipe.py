"""The recipes of deploy/ without containers: each container is a process with the same command.

A process has the environment and the volumes of its container: the folders of its mounts stand for
their paths in the container, and an address of its own in 127.0.0.0/8 for its network. A path that
no volume holds is an error, because the root of each container is read-only.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from tests.deploy.files import DEPLOY, ROOT, compose, containers, dockerfile, environment, workloads
from tests.deploy.files import image_name as name_of_image

STATE: Final = "RECIPE_STATE"  # the environment variable of the stand-ins for docker and kubectl
START_S: Final = 90.0
STOP_S: Final = 60.0
PROGRAMS: Final = {"fleet": "fleet.cli", "edge-agent": "edge_agent"}
STAND_IN: Final = '#!/bin/sh\nexec "{python}" -m tests.deploy.stand_ins {name} "$@"\n'
"""The program that a recipe calls as `name`."""


class State(msgspec.Struct, kw_only=True):
    """The values of one run; they are the same for every process of it."""

    folder: str
    bundle: str
    database: str
    server: str
    broker: str

    @property
    def volumes(self) -> Path:
        return Path(self.folder) / "volumes"

    @property
    def secrets(self) -> Path:
        return Path(self.folder) / "secrets"

    @property
    def compose_folder(self) -> Path:
        return Path(self.folder) / "deploy/compose"

    def address(self, pod: str) -> str:
        """Return the address of a container or pod."""
        if pod == "server":
            return self.server
        first, _, last = self.server.rpartition(".")
        return f"{first}.{(int(last) + 1 + sum(pod.encode())) % 250 + 1}"


@dataclass(frozen=True)
class Container:
    """A container's command with its environment, mounts and address."""

    command: Sequence[str]
    environment: Mapping[str, str]
    mounts: Mapping[str, Path]
    address: str

    def run(self, command: Sequence[str] | None = None) -> int:
        """Run a command, by default its own, to the end; return the exit status."""
        return subprocess.run(
            self._on_host(command or self.command), env=self._variables(), check=False
        ).returncode

    @contextmanager
    def running(self) -> Iterator[subprocess.Popen[bytes]]:
        """Run its command in the block."""
        process = subprocess.Popen(self._on_host(self.command), env=self._variables())
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(STOP_S)
            finally:
                process.kill()

    def _on_host(self, command: Sequence[str]) -> list[str]:
        program, *arguments = command
        for argument in arguments:
            if argument.startswith("/"):
                assert self._translated(argument) != argument, f"no volume holds {argument}"
        words = [self._translated(argument) for argument in arguments]
        if program in PROGRAMS:
            return [sys.executable, "-m", PROGRAMS[program], *words]
        return [sys.executable if program == "python" else program, *words]

    def _variables(self) -> dict[str, str]:
        values = {name: self._translated(value) for name, value in self.environment.items()}
        kept = ("PATH", "PYTHONPATH", "OMP_NUM_THREADS")
        return {name: os.environ[name] for name in kept if name in os.environ} | values

    def _translated(self, text: str) -> str:
        paths = "|".join(map(re.escape, sorted(self.mounts, key=len, reverse=True)))
        if paths:
            text = re.sub(
                rf"(?<![\w/.-])({paths})(?![\w.-])", lambda found: str(self.mounts[found[1]]), text
            )
        return text.replace("0.0.0.0", self.address).replace("127.0.0.1", self.address)


def new_state(folder: Path, bundle: Path, database: str) -> State:
    """Return the values of a new run, with addresses that no other run uses."""
    draw = random.SystemRandom().randint
    network = f"127.{draw(1, 250)}.{draw(1, 250)}"
    shutil.copytree(DEPLOY, folder / "deploy")
    return State(
        folder=str(folder),
        bundle=str(bundle),
        database=database.replace("127.0.0.1", "localhost"),  # the same for each container
        server=f"{network}.251",
        broker=f"{network}.252",
    )


def run_script(state: State, script: str, folder: Path) -> str:
    """Run a block of the documentation by bash with the stand-ins; return its output."""
    programs = Path(state.folder) / "programs"
    programs.mkdir(exist_ok=True)
    for name in ("docker", "kubectl", "sudo"):
        path = programs / name
        path.write_text(STAND_IN.format(python=sys.executable, name=name))
        path.chmod(0o755)
    variables = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
        "NO_COLOR": "1",
        STATE: msgspec.json.encode(state).decode(),
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    return done.stdout


# Compose.


def compose_container(state: State, name: str, arguments: Sequence[str] = ()) -> Container:
    """Return the container of a service; `arguments` replace its command."""
    service = compose()["services"][name]
    variables = _dot_env(state)
    image = dockerfile()[name_of_image(service["image"])]
    words = list(arguments) or service["command"]
    own = {
        key: variables.get(key) if value is None else _filled(value, variables)
        for key, value in service.get("environment", {}).items()
    }
    mounts = dict(_compose_mount(state, each, variables) for each in service["volumes"])
    return Container(
        command=[*image.entrypoint, *(_filled(word, variables) for word in words)],
        environment=environment()
        | {key: _reachable(state, value) for key, value in own.items() if value is not None},
        mounts=mounts | {path: _made(state.volumes / name / "tmp") for path in service["tmpfs"]},
        address=state.address(name),
    )


def healthcheck(state: State, name: str) -> bool:
    """Run the health check of a service; whether it succeeds."""
    _, *command = compose()["services"][name]["healthcheck"]["test"]
    container = compose_container(state, name)
    return (
        subprocess.run(container._on_host(command), capture_output=True, check=False).returncode
        == 0
    )


def _dot_env(state: State) -> dict[str, str]:
    lines = (state.compose_folder / ".env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines)


def _filled(text: str, variables: Mapping[str, str]) -> str:
    return re.sub(r"\$\{(\w+)[^}]*\}", lambda found: variables[found[1]], text)


def _compose_mount(state: State, mount: str, variables: Mapping[str, str]) -> tuple[str, Path]:
    source, path = _filled(mount, variables).removesuffix(":ro").split(":")
    if source.startswith("."):
        return path, state.compose_folder / source
    return path, Path(source) if source.startswith("/") else _made(state.volumes / source)


# Kubernetes.


def pod_containers(state: State, workload: str, pod: str) -> dict[str, Container]:
    """Return the containers of a pod of a workload by name, the first ones first."""
    (found,) = (each for each in workloads() if each["metadata"]["name"] == workload)
    spec = found["spec"]["template"]["spec"]
    volumes = {each["name"]: _pod_volume(state, each, pod) for each in spec["volumes"]}
    return {each["name"]: _pod_container(state, each, volumes, pod) for each in containers(found)}


def _pod_container(
    state: State, container: dict[str, Any], volumes: Mapping[str, Path], pod: str
) -> Container:
    variables = {"HOSTNAME": pod}
    for source in container.get("envFrom", ()):
        secret = state.secrets / source["secretRef"]["name"]
        variables |= {path.name: path.read_text() for path in secret.iterdir()}
    entrypoint = container.get("command") or dockerfile()[container["image"].split("/")[1]][0]
    words = [*entrypoint, *container.get("args", ())]
    return Container(
        command=[re.sub(r"\$\((\w+)\)", lambda found: variables[found[1]], word) for word in words],
        environment=environment() | {k: _reachable(state, v) for k, v in variables.items()},
        mounts={each["mountPath"]: volumes[each["name"]] for each in container["volumeMounts"]},
        address=state.address(pod),
    )


def _pod_volume(state: State, volume: dict[str, Any], pod: str) -> Path:
    if "secret" in volume:
        return state.secrets / str(volume["secret"]["secretName"])
    if "emptyDir" in volume:
        return _made(state.volumes / pod / volume["name"])
    claim = str(volume["persistentVolumeClaim"]["claimName"])
    return Path(state.bundle) if claim == "bundle" else _made(state.volumes / claim)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _reachable(state: State, value: str) -> str:
    """Replace the database of a recipe by one that runs here."""
    return re.sub(r"postgresql://fleet:[^@]*@[\w.]+/fleet", state.database, value)


def wait_for(condition: Any, what: str) -> None:
    deadline = time.monotonic() + START_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {START_S} s in vain until {what}"
        time.sleep(0.2)
