"""A fair (first come, first served) lock."""

from __future__ import annotations

import threading
from collections import deque


class FairLock:
    """A lock that is granted in the order of the requests; use it with `with`.

    Python's own lock may be acquired again and again by the thread that has just released it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_held = False
        self._waiting: deque[threading.Event] = deque()

    def __enter__(self) -> None:
        with self._lock:
            if not self._is_held:
                self._is_held = True
                return
            granted = threading.Event()
            self._waiting.append(granted)
        granted.wait()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().set()  # handed over: the lock stays held
            else:
                self._is_held = False

    @property
    def is_free(self) -> bool:
        """Whether no thread holds the lock."""
        return not self._is_held

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)
