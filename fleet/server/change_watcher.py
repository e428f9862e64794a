"""What follows from changes of the registry: done in the server, whoever made them and from wherever."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

from fleet.errors import FleetError
from fleet.registry.store import Registry

POLL_S: Final = 1.0
CLOSE_S: Final = 5.0

log = logging.getLogger(__name__)


class ChangeWatcher:
    """Looks at the audit log's newest number once a second; a context manager with one thread.

    A task runs at the start and after every change, again until it succeeds; a periodic one in every round.
    """

    def __init__(self, registry: Registry, poll_s: float = POLL_S) -> None:
        self._registry = registry
        self._poll_s = poll_s
        self._tasks: list[_Task] = []
        self._again = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="changes", daemon=True)

    def add(self, work: Callable[[], None], *, periodic: bool = False) -> None:
        """Before the block begins. `work` runs on the watcher's thread, one after the other; it must not wait long."""
        self._tasks.append(_Task(work, periodic))

    def again(self) -> None:
        """Has every task run again soon, from any thread: after a link came back, for instance."""
        self._again.set()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._closing = True
        self._again.set()
        self._thread.join(CLOSE_S)

    def _run(self) -> None:
        while not self._closing:
            try:
                newest = self._registry.newest_change()
            except FleetError as error:
                log.warning("changes are not seen: %s", error)
            except Exception:  # the outermost boundary of a thread
                log.exception("changes are not seen")
            else:
                for task in self._tasks:
                    task.run(newest)
            if self._again.wait(self._poll_s):
                self._again.clear()
                for task in self._tasks:
                    task.forget()


class _Task:
    def __init__(self, work: Callable[[], None], periodic: bool) -> None:
        self._work = work
        self._periodic = periodic
        self._done = -1

    def forget(self) -> None:
        self._done = -1

    def run(self, newest: int) -> None:
        if self._done == newest and not self._periodic:
            return
        try:
            self._work()
        except FleetError as error:
            log.warning("%s; trying again", error)
        except Exception:  # the outermost boundary of a thread
            log.exception("a change did not take effect; trying again")
        else:
            self._done = newest
