"""An operator who runs commands in a separate folder, on free ports, with a given bundle."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

from fleet.bundles.manifest import Bundle
from tests.brokers import free_port

TIMEOUT_S: Final = 240.0


class Operator:
    """Run command lines; only the ports and the bundle of `fleet up` are replaced."""

    def __init__(self, folder: Path, bundle: Bundle, up_options: str, stack: ExitStack) -> None:
        self.folder = folder
        self._stack = stack
        self._port = free_port()
        self._service_port = free_port()
        ports = f"--port {self._port} --service-port {self._service_port}"
        self._up_options = f"{ports} --bundle {bundle.folder} {up_options}"
        binaries = Path(sys.executable).parent
        path = os.pathsep.join([str(binaries), os.environ["PATH"]])
        self._environment = os.environ | {
            "PATH": path,
            "FLEET_HOME": str(folder / "home"),
            "NO_COLOR": "1",
        }

    def type(self, line: str) -> str:
        """Runs a line to its end; what it printed."""
        done = self.try_to(line)
        assert done.returncode == 0, f"{line}: {done.stdout}{done.stderr}"
        return done.stdout

    def try_to(self, line: str) -> subprocess.CompletedProcess[str]:
        """Runs a line that may fail."""
        return subprocess.run(
            shlex.split(self._adapted(line)),
            cwd=self.folder,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )

    def start(self, line: str, until: str) -> subprocess.Popen[str]:
        """Starts a line that runs on, and waits until it says `until`."""
        process = subprocess.Popen(
            shlex.split(self._adapted(line)),
            cwd=self.folder,
            env=self._environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._stack.callback(end, process)
        killer = threading.Timer(TIMEOUT_S, process.kill)
        killer.start()
        assert process.stdout
        assert any(until in said for said in iter(process.stdout.readline, "")), (
            f"{line} never said {until!r}"
        )
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
