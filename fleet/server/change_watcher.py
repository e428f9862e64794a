"""Tasks of the server that follow changes of the registry, whichever process made them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Final, Self

from fleet.errors import FleetError
from fleet.registry.store import Registry
from fleet.utils.rate_limited_log import RateLimitedLog

POLL_S: Final = 1.0
CLOSE_S: Final = 5.0
WARNING_S: Final = 60.0
"""Minimum time between two warnings of a task that fails in each round."""

log = logging.getLogger(__name__)


class ChangeWatcher:
    """A poll of the audit log's newest number, once a second; a context manager with one thread.

    A task runs at the start and after every change. If it fails, it runs again in each round until
    it succeeds. A periodic task runs in every round. `on_cycle` is called once a round.
    """

    def __init__(self, registry: Registry, poll_s: float = POLL_S) -> None:
        self._registry = registry
        self._poll_s = poll_s
        self._tasks: list[_Task] = []
        self._wake = threading.Event()
        self._closing = False
        self._log = RateLimitedLog(log, WARNING_S)
        self.on_cycle: Callable[[], None] = lambda: None
        self._thread = threading.Thread(target=self._run, name="changes", daemon=True)

    def add(self, work: Callable[[], None], *, periodic: bool = False) -> None:
        """Add a task before the block begins; `work` must not block for long."""
        self._tasks.append(_Task(work, periodic))

    def run_again(self) -> None:
        """Run every task again soon, for instance after a new connection; any thread may call."""
        self._wake.set()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing = True
        self._wake.set()
        self._thread.join(CLOSE_S)

    def _run(self) -> None:
        while not self._closing:
            self.on_cycle()
            self._run_tasks()
            if self._wake.wait(self._poll_s):
                self._wake.clear()
                for task in self._tasks:
                    task.reset()

    def _run_tasks(self) -> None:
        try:
            newest = self._registry.audit_log.newest_change()
        except FleetError as error:
            self._log.warning("cannot read the changes of the registry: %s", error)
        except Exception:  # the thread must go on
            log.exception("cannot read the changes of the registry")
        else:
            for task in self._tasks:
                task.run(newest)


class _Task:
    def __init__(self, work: Callable[[], None], periodic: bool) -> None:
        self._work = work
        self._periodic = periodic
        self._done = -1
        self._log = RateLimitedLog(log, WARNING_S)

    def reset(self) -> None:
        self._done = -1

    def run(self, newest: int) -> None:
        if self._done == newest and not self._periodic:
            return
        try:
            self._work()
        except (FleetError, OSError) as error:
            self._log.warning("%s; trying again", error)
        except Exception:  # the thread must go on
            log.exception("a change did not take effect; trying again")
        else:
            self._done = newest
