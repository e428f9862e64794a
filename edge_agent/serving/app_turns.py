"""A queue that serves apps in turn: an app with many items delays the others by one of them."""

from __future__ import annotations

import threading
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class AppTurns(Generic[T]):
    """A queue of items, each of an app. Any thread may use it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._items: dict[str, deque[T]] = {}  # by app; the first app is next
        self._is_closed = False

    def put(self, app: str, item: T) -> None:
        """Add an item, behind the others of its app."""
        with self._changed:
            self._items.setdefault(app, deque()).append(item)
            self._changed.notify()

    def get(self) -> T | None:
        """Wait for the next item; None if the queue is closed and empty."""
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._is_closed)
            if not self._items:
                return None
            app = next(iter(self._items))
            items = self._items.pop(app)
            item = items.popleft()
            if items:
                self._items[app] = items  # behind the other apps
            return item

    def close(self) -> None:
        """Make `get` return None once the queue is empty."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
