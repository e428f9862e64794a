"""Messages to the service manager that runs this process, by systemd's protocol sd_notify(3).

The messages are datagrams to the socket that ``NOTIFY_SOCKET`` names. Without the variable, as in a
terminal, each call does nothing.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Final

READY: Final = "READY=1"
STOPPING: Final = "STOPPING=1"
ALIVE: Final = "WATCHDOG=1"
MESSAGES_AN_INTERVAL: Final = 4  # a loop may be late by three quarters of the interval
SEND_TIMEOUT_S: Final = 1.0


def notify(message: str) -> None:
    """Send a message to the service manager; a lost one is not an error of this process."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):  # an abstract name of Linux
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as link, suppress(OSError):
        link.settimeout(SEND_TIMEOUT_S)
        link.sendto(message.encode(), address)


def watchdog_interval_s(environ: Mapping[str, str] = os.environ) -> float | None:
    """Return the longest time between two messages; None when the manager expects none.

    The variables are those of sd_watchdog_enabled(3).
    """
    interval_us = environ.get("WATCHDOG_USEC", "")
    is_ours = environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    if not is_ours or not interval_us.isdecimal() or int(interval_us) == 0:
        return None
    return int(interval_us) / 1e6


class Watchdog:
    """The progress of a process's loops as messages to the service manager.

    Each loop reports its cycles. A message is sent by the last loop that has completed a cycle
    since the message before. One loop that hangs therefore ends the messages, and the manager
    restarts the process. There is no thread that sends messages by itself.
    """

    def __init__(self) -> None:
        self._interval_s = watchdog_interval_s()
        self._lock = threading.Lock()
        self._loops: set[str] = set()
        self._pending: set[str] = set()
        self._next_at = 0.0

    def watch(self, loop: str) -> Callable[[], None]:
        """Add a loop; return the function that it has to call in each cycle."""
        self._loops.add(loop)
        self._pending.add(loop)
        return lambda: self._complete_cycle(loop)

    def _complete_cycle(self, loop: str) -> None:
        if self._interval_s is None:
            return
        now = time.monotonic()
        with self._lock:
            self._pending.discard(loop)
            is_due = not self._pending and now >= self._next_at
            if is_due:
                self._pending = set(self._loops)
                self._next_at = now + self._interval_s / MESSAGES_AN_INTERVAL
        if is_due:
            notify(ALIVE)
