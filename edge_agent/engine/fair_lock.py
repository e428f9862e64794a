"""A lock that is granted to its users in turns."""

from __future__ import annotations

import threading
from collections import deque


class FairLock:
    """A lock for users with several threads each, e.g. apps with several requests.

    Among the users that wait it is granted to the one that has not had it for the longest time;
    among the threads of a user, in the order of the requests. Python's own lock may be acquired
    again and again by the thread that has just released it.
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
