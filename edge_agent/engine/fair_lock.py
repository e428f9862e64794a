"""Turns at a thing that one can use at a time."""

from __future__ import annotations

import threading
from collections import deque
from types import TracebackType


class FairLock:
    """A lock that is given in the order in which it was asked for. `with turns:` waits for a turn and takes it.

    Python's own lock may be won again and again by the thread that has just let go of it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken = False
        self._waiting: deque[threading.Event] = deque()

    def __enter__(self) -> None:
        with self._lock:
            if not self._taken:
                self._taken = True
                return
            turn = threading.Event()
            self._waiting.append(turn)
        turn.wait()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().set()  # handed over: it stays taken
            else:
                self._taken = False

    @property
    def is_free(self) -> bool:
        """Whether nobody has it."""
        return not self._taken

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)
