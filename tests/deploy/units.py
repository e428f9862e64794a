"""systemd's unit files, and their services as processes without systemd."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from fleet.utils.service_manager import READY
from tests.service_manager import notify_socket

STOP_S: Final = 120.0
KEPT: Final = ("PYTHONPATH", "OMP_NUM_THREADS", "CI")


class Unit:
    """One unit file: the values of each setting, in order."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self.settings: dict[str, list[str]] = defaultdict(list)
        for line in path.read_text(encoding="utf-8").splitlines():
            if line and line[0] not in "[#":
                name, value = line.split("=", 1)
                self.settings[name].append(value)

    def value(self, name: str) -> str:
        (value,) = self.settings[name]
        return value

    def commands(self, name: str) -> list[list[str]]:
        """Return the command lines of a setting, in which systemd's escapes are undone."""
        lines = [re.sub(r"([$%])\1", r"\1", line) for line in self.settings[name]]
        return [shlex.split(line) for line in lines]

    def environment(self, folder: Path) -> dict[str, str]:
        """Return the environment that systemd gives a service, and no variable of this shell."""
        given = [shlex.split(line) for line in self.settings["Environment"]]
        kept = {name: os.environ[name] for name in KEPT if name in os.environ}
        words = dict(word.split("=", 1) for words in given for word in words)
        return {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin", **kept, **words} | {
            "HOME": str(folder),
            "NO_COLOR": "1",
        }


def run_service(unit: Unit, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a service of the type oneshot to its end."""
    (command,) = unit.commands("ExecStart")
    return subprocess.run(
        command,
        env=unit.environment(folder),
        cwd="/",
        capture_output=True,
        text=True,
        timeout=STOP_S,
        check=False,
    )


@contextmanager
def service(unit: Unit, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a service in the block, which begins when it is ready, if its type reports that."""
    folder.mkdir()
    (command,) = unit.commands("ExecStart")
    for before in unit.commands("ExecStartPre"):
        subprocess.run(before, env=unit.environment(folder), cwd="/", timeout=STOP_S, check=True)
    with notify_socket(folder) as manager:
        environment = unit.environment(folder)
        if unit.settings["WatchdogSec"]:
            environment |= manager.environment(float(unit.value("WatchdogSec")))
        process = subprocess.Popen(command, env=environment, cwd="/", stdout=subprocess.DEVNULL)
        try:
            if unit.value("Type") == "notify":
                manager.wait_for(READY)
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_S)
            finally:
                process.kill()


def find_systemd_analyze() -> str:
    """Return the path of the program; skip the test without it, or fail under CI."""
    program = shutil.which("systemd-analyze")
    if program:
        return program
    reason = "systemd-analyze is not installed; scripts/install_systemd.sh installs it"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)
