"""A lock that its users acquire in turn."""

from __future__ import annotations

import threading
from collections import deque


class FairLock:
    """A lock for users with several threads each, e.g. apps with several requests.

    Of the waiting users, the one that has not had the lock for the longest time gets it. The
    threads of one user get it in the order of their requests. With Python's own lock, the thread
    that has just released it could acquire it again and again.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_held = False
        self._waiting: dict[str, deque[threading.Event]] = {}
        self._num_turns = 0
        self._last_turn: dict[str, int] = {}

    def of(self, user: str) -> UserLock:
        """Return the lock as `user` uses it."""
        return UserLock(self, user)

    def acquire(self, user: str) -> None:
        """Wait for a turn of `user`."""
        with self._lock:
            if not self._is_held:
                self._is_held = True
                self._count_turn(user)
                return
            granted = threading.Event()
            self._waiting.setdefault(user, deque()).append(granted)
        granted.wait()

    def release(self) -> None:
        """Hand the lock over to the thread whose turn it is."""
        with self._lock:
            if not self._waiting:
                self._is_held = False
                return
            user = min(self._waiting, key=lambda name: self._last_turn.get(name, 0))
            self._count_turn(user)
            threads = self._waiting[user]
            threads.popleft().set()  # the lock stays held
            if not threads:
                del self._waiting[user]

    def _count_turn(self, user: str) -> None:
        self._num_turns += 1
        self._last_turn[user] = self._num_turns

    @property
    def is_free(self) -> bool:
        """Whether no thread holds the lock."""
        return not self._is_held

    @property
    def num_waiting(self) -> int:
        return sum(map(len, list(self._waiting.values())))


class UserLock:
    """The lock of one user; use it with `with`."""

    def __init__(self, lock: FairLock, user: str) -> None:
        self._lock = lock
        self._user = user

    def __enter__(self) -> None:
        self._lock.acquire(self._user)

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    @property
    def is_free(self) -> bool:
        """Whether no thread of any user holds the lock."""
        return self._lock.is_free
