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
REPEAT_S: Final = 5.0
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

    def interrupt_input(self, until: str) -> str:
        """Press Ctrl-C at a prompt, again every few seconds, until the program prints `until`.

        CPython's readline looks for signals before it waits for a key. One that comes between the
        two is handled with the next.
        """
        begin = len(self.screen)
        deadline = time.monotonic() + WAIT_S
        while until not in self.screen[begin:] and time.monotonic() < deadline:
            os.write(self._descriptor, CTRL_C.encode())
            self._read_for(REPEAT_S, until, begin)
        return self.wait(until, begin)

    def _read_for(self, seconds: float, until: str, begin: int) -> None:
        deadline = time.monotonic() + seconds
        while until not in self.screen[begin:] and time.monotonic() < deadline:
            self._read()

    def wait(self, until: str, begin: int = 0) -> str:
        """Wait until the program prints `until` after `begin`; what it has printed since."""
        deadline = time.monotonic() + WAIT_S
        while until not in self.screen[begin:]:
            assert time.monotonic() < deadline, (
                f"no {until!r} in {self.screen[begin:]!r}, after {self.screen[:begin][-300:]!r}"
            )
            self._read()
        return self.screen[begin:]

    def _read(self) -> None:
        if select.select([self._descriptor], [], [], 0.1)[0]:
            self.screen += os.read(self._descriptor, 65_536).decode(errors="replace")


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
