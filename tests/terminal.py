"""A program in a terminal of 80 columns, with its keys and its screen."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import termios
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

WAIT_S: Final = 60.0
SIZE: Final = struct.pack("HHHH", 24, 80, 0, 0)
CTRL_C: Final = "\x03"
CTRL_D: Final = "\x04"
UP: Final = "\x1b[A"
LEFT: Final = "\x1b[D"


class Terminal:
    """The terminal of one program."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.screen = ""

    def type(self, keys: str, until: str) -> str:
        """Press keys, wait until the program prints `until`, and return what it printed."""
        begin = len(self.screen)
        os.write(self._descriptor, keys.encode())
        return self.wait(until, begin)

    def wait(self, until: str, begin: int = 0) -> str:
        """Wait until the program prints `until` after `begin`; what it has printed since."""
        deadline = time.monotonic() + WAIT_S
        while until not in self.screen[begin:]:
            assert time.monotonic() < deadline, (
                f"no {until!r} in {self.screen[begin:]!r}, after {self.screen[:begin][-300:]!r}"
            )
            if select.select([self._descriptor], [], [], 0.1)[0]:
                self.screen += os.read(self._descriptor, 65_536).decode(errors="replace")
        return self.screen[begin:]


@contextmanager
def terminal(command: Sequence[str]) -> Iterator[Terminal]:
    """Run a command in a terminal; it has to end by itself before the block does."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job has none
    process, descriptor = pty.fork()
    if process == 0:
        environment = {key: os.environ[key] for key in os.environ.keys() - {"COLUMNS", "NO_COLOR"}}
        os.execve(command[0], tuple(command), environment | {"TERM": "xterm"})
    signal.signal(signal.SIGINT, handler)
    try:
        fcntl.ioctl(descriptor, termios.TIOCSWINSZ, SIZE)
        yield Terminal(descriptor)
    finally:
        os.close(descriptor)
        os.waitpid(process, 0)
