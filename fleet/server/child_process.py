"""Child processes of `fleet up` and `fleet demo`, with deadlines for their start and their end."""

from __future__ import annotations

import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Final

from fleet.errors import FleetError
from fleet.utils.host_address import host_port

START_TIMEOUT_S: Final = 180.0  # a busy machine loads PyTorch and a model for a minute
DRAIN_TIMEOUT_S: Final = 5.0  # for the sessions of a worker of `fleet up`; other workers have more
LISTEN_CHECK_S: Final = 0.05
STOP_TIMEOUT_S: Final = 20.0  # more than a worker's drain, its last step and its last messages


class Child:
    """A process that prints one line when it is ready. It writes to the stderr of this process."""

    def __init__(
        self, title: str, arguments: Sequence[str], program: Sequence[str] = (sys.executable, "-m")
    ) -> None:
        self.title = title
        self.process = subprocess.Popen(
            [*program, *arguments],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        self.ready_line = ""
        self._is_stopping = False
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, args=(self.process.stdout,), daemon=True).start()

    def _read(self, stdout: IO[str]) -> None:
        with stdout:
            for line in stdout:
                self._lines.put(line.strip())
        self._lines.put("")

    def wait_ready(self, timeout_s: float = START_TIMEOUT_S) -> str:
        """Wait for the line that announces readiness.

        Raises:
            FleetError: the process ended, or printed nothing in time.
        """
        try:
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            raise FleetError(f"{self.title} was not ready within {timeout_s:g} s") from None
        if not line:
            raise self._not_started(self.process.wait(STOP_TIMEOUT_S))
        self.ready_line = line
        return line

    def wait_listening(self, host: str, port: int, timeout_s: float = START_TIMEOUT_S) -> str:
        """Wait until a process that prints nothing listens on a port.

        Raises:
            FleetError: the process ended, or did not listen in time.
        """
        deadline = time.monotonic() + timeout_s
        while not _listens(host, port):
            status = self.process.poll()
            if status is not None:
                raise self._not_started(status)
            if time.monotonic() > deadline:
                raise FleetError(
                    f"{self.title} did not listen on {host_port(host, port)} within {timeout_s:g} s"
                )
            time.sleep(LISTEN_CHECK_S)
        self.ready_line = f"{self.title} listens on {host_port(host, port)} (TLS)"
        return self.ready_line

    def _not_started(self, status: int) -> FleetError:
        return FleetError(f"{self.title} did not start (exit status {status}); see above")

    def request_stop(self) -> None:
        """Send SIGTERM once: a second one would make a worker abandon its sessions."""
        if not self._is_stopping:
            self._is_stopping = True
            self.process.terminate()

    def stop(self) -> None:
        """Stop the process; kill it when it does not end in time."""
        self.request_stop()
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), LISTEN_CHECK_S).close()
    except OSError:
        return False
    return True


@contextmanager
def running(process: Child) -> Iterator[Child]:
    """Stop a process at the end of the block."""
    try:
        yield process
    finally:
        process.stop()


@contextmanager
def child(title: str, *arguments: str) -> Iterator[Child]:
    """Run ``python -m <arguments>`` for the length of the block."""
    with running(Child(title, arguments)) as process:
        yield process
