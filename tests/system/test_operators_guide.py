"""The ten lines of the README's guide, typed as a new operator does: on SQLite with amqtt, PostgreSQL with mosquitto.

What differs from the page are free ports, and the tiny model in place of the default one.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from fleet.manifest import Bundle
from tests.brokers import free_port, wait_until
from tests.postgresql import Databases

README = (Path(__file__).parents[2] / "README.md").read_text()
GUIDE = [
    line.split("  #")[0].strip()
    for line in README.split("## Operator's guide\n\n```sh\n")[1].split("```")[0].splitlines()
]
TIMEOUT_S = 120.0
OUT_S = 10.0


class Operator:
    """Types lines of the guide into a folder of its own."""

    def __init__(self, folder: Path, bundle: Bundle, up_options: str, stack: ExitStack) -> None:
        self.folder = folder
        self._stack = stack
        self._port, self._service_port = free_port(), free_port()
        self._up_options = (
            f"--port {self._port} --service-port {self._service_port} --bundle {bundle.folder} {up_options}"
        )
        binaries = Path(sys.executable).parent
        path = os.pathsep.join([str(binaries), os.environ["PATH"]])
        self._environment = os.environ | {"PATH": path, "FLEET_HOME": str(folder / "home"), "NO_COLOR": "1"}

    def type(self, line: str) -> str:
        """Runs a line to its end; what it printed."""
        done = subprocess.run(
            shlex.split(self._adapted(line)), cwd=self.folder, env=self._environment, capture_output=True, text=True,
            timeout=TIMEOUT_S, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{line}: {done.stdout}{done.stderr}"
        return done.stdout

    def start(self, line: str, until: str) -> subprocess.Popen[str]:
        """Starts a line that runs on, and waits until it says `until`."""
        process = subprocess.Popen(
            shlex.split(self._adapted(line)), cwd=self.folder, env=self._environment, stdout=subprocess.PIPE, text=True
        )
        self._stack.callback(end, process)
        killer = threading.Timer(TIMEOUT_S, process.kill)
        killer.start()
        assert process.stdout
        assert any(until in said for said in iter(process.stdout.readline, "")), f"{line} never said {until!r}"
        killer.cancel()
        return process

    def ask(self, line: str) -> Any:
        return json.loads(self.type(f"{line} --json"))

    def _adapted(self, line: str) -> str:
        if line == "fleet up":
            return f"{line} {self._up_options}"
        return line.replace(":8443", f":{self._service_port}")


@contextmanager
def operator(folder: Path, bundle: Bundle, up_options: str = "") -> Iterator[Operator]:
    with ExitStack() as stack:
        yield Operator(folder, bundle, up_options, stack)


def end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()


def follow_the_guide(operator: Operator) -> None:
    """Types its lines in order, and looks at what each has done."""
    _, up, enroll, join, run, prompt, stats, config, doctor, revoke = GUIDE
    operator.start(up, "the fleet is up")
    printed = operator.type(enroll)
    command = re.search(r"edge-agent join (\S+) --server (\S+)", printed)
    assert command, printed
    operator.type(join.replace("TOKEN", command[1]))
    device = operator.start(run, "serves")
    answer = operator.ask(prompt)
    (counted,) = operator.ask(stats)
    assert counted["tokens"] == sum(answer["results"][0]["sources"].values()) > 0
    operator.type(config)
    wait_until(lambda: operator.ask("fleet config diff") == [], "the device follows", TIMEOUT_S)
    (row,) = operator.ask("fleet devices")
    assert (row["device"], row["group"], row["online"], row["state"], row["mode"]) == (
        "kitchen", "home", True, "active", "auto",
    )  # fmt: skip
    assert "no problem found" in operator.type(doctor)
    operator.type(revoke)
    wait_until(lambda: not operator.ask("fleet devices")[0]["online"], "it is out", OUT_S)
    assert device.poll() is None
    refused = subprocess.run(
        ["fleet", "prompt", "kitchen", "Still there?"], cwd=operator.folder, env=operator._environment,
        capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
    )  # fmt: skip
    assert refused.returncode == 1
    assert "offline" in refused.stderr


def test_the_guide_has_ten_lines() -> None:
    assert len(GUIDE) == 10


def test_the_guide_works_on_sqlite_with_the_embedded_broker(tmp_path: Path, tiny_bundle: Bundle) -> None:
    with operator(tmp_path, tiny_bundle) as typing:
        follow_the_guide(typing)


@pytest.mark.mosquitto
def test_the_guide_works_on_postgresql_with_mosquitto(
    tmp_path: Path, tiny_bundle: Bundle, postgresql: Databases
) -> None:
    with (
        postgresql.database(empty=True) as url,
        operator(tmp_path, tiny_bundle, f"--broker mosquitto --registry {url}") as typing,
    ):
        follow_the_guide(typing)
