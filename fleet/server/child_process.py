"""Child processes of `fleet up` and `fleet demo`: started with a deadline, stopped in good order."""

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

START_TIMEOUT_S: Final = 60.0
DRAIN_TIMEOUT_S: Final = (
    5.0  # what `fleet up` leaves a worker's sessions; on its own it may take longer
)
LISTEN_CHECK_S: Final = 0.05
STOP_TIMEOUT_S: Final = (
    20.0  # more than a worker's sessions, its last step and its farewells take together
)


class Child:
    """A process that prints one line when it is ready. What it prints on stderr goes to ours."""

    def __init__(
        self, title: str, arguments: Sequence[str], program: Sequence[str] = (sys.executable, "-m")
    ) -> None:
        self.title = title
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            [*program, *arguments], stdout=subprocess.PIPE, text=True, env=environment
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
        """The line that says it is ready.

        Raises:
            FleetError: it ended, or said nothing in time.
        """
        try:
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            raise FleetError(f"{self.title} was not ready within {timeout_s:g} s") from None
        if not line:
            raise FleetError(
                f"{self.title} did not start (exit status {self.process.wait(STOP_TIMEOUT_S)}); see above"
            )
        self.ready_line = line
        return line

    def wait_listening(self, host: str, port: int, timeout_s: float = START_TIMEOUT_S) -> str:
        """The same of a program that says nothing, but listens on a port when it is ready.

        Raises:
            FleetError: it ended, or did not listen in time.
        """
        deadline = time.monotonic() + timeout_s
        while not _listens(host, port):
            if self.process.poll() is not None:
                raise FleetError(
                    f"{self.title} did not start (exit status {self.process.returncode}); see above"
                )
            if time.monotonic() > deadline:
                raise FleetError(
                    f"{self.title} did not listen on {host}:{port} within {timeout_s:g} s"
                )
            time.sleep(LISTEN_CHECK_S)
        self.ready_line = f"{self.title} listens on {host}:{port} (TLS)"
        return self.ready_line

    def ask_to_stop(self) -> None:
        """Once only: a second SIGTERM would tell a worker to leave its sessions at once."""
        if not self._is_stopping:
            self._is_stopping = True
            self.process.terminate()

    def stop(self) -> None:
        """Asks it to end, and kills it when it does not."""
        self.ask_to_stop()
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
    """Stops a process at the end of the block."""
    try:
        yield process
    finally:
        process.stop()


@contextmanager
def child(title: str, *arguments: str) -> Iterator[Child]:
    """Runs ``python -m <arguments>`` for the length of the block."""
    with running(Child(title, arguments)) as process:
        yield process
