"""A service manager for tests: a socket that receives what a process sends by sd_notify(3)."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

WAIT_S: Final = 120.0


class NotifySocket:
    """The messages of one process, in the order of their arrival."""

    def __init__(self, path: Path, link: socket.socket) -> None:
        self.path = path
        self._link = link

    def environment(self, watchdog_s: float | None = None) -> dict[str, str]:
        """Return the variables that the process needs, as systemd sets them."""
        variables = {"NOTIFY_SOCKET": str(self.path)}
        if watchdog_s:
            variables["WATCHDOG_USEC"] = str(round(watchdog_s * 1e6))
        return variables

    def receive(self, timeout_s: float) -> str | None:
        """Return the next message, or None if none arrives in time."""
        self._link.settimeout(timeout_s)
        try:
            return self._link.recv(4096).decode()
        except TimeoutError:
            return None

    def wait_for(self, message: str, timeout_s: float = WAIT_S) -> list[str]:
        """Return the messages up to `message`; the test fails when it does not arrive."""
        deadline = time.monotonic() + timeout_s
        received: list[str] = []
        while message not in received:
            arrived = self.receive(max(0.01, deadline - time.monotonic()))
            assert arrived, f"expected {message} within {timeout_s} s, received {received}"
            received.append(arrived)
        return received

    def wait_silent(self, silence_s: float, timeout_s: float = WAIT_S) -> None:
        """Wait until no message arrives for `silence_s` seconds; the test fails otherwise."""
        deadline = time.monotonic() + timeout_s
        while self.receive(silence_s):
            assert time.monotonic() < deadline, "messages arrive, although the loop hangs"


@contextmanager
def notify_socket(folder: Path) -> Iterator[NotifySocket]:
    """Open a socket in a folder for the length of the block."""
    path = folder / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as link:
        link.bind(str(path))
        try:
            yield NotifySocket(path, link)
        finally:
            path.unlink()
