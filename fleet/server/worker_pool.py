"""Workers that `fleet up` starts for bundles that devices are wanted on, and stops when nobody wants them any more."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, NamedTuple, Self

from fleet.errors import FleetError
from fleet.server.child_process import DRAIN_TIMEOUT_S, Child
from fleet.server.home import FleetHome
from fleet.server.supervisor import worker_folder, worker_name

LOOK_S: Final = 2.0
LEAVE_S: Final = 300.0
"""How long a worker that nobody wants is kept."""

RESTART_S: Final = 30.0
"""How long after its start a worker that has ended is started again, at the soonest."""

log = logging.getLogger(__name__)


@dataclass
class ManagedWorker:
    """A worker of one bundle; `wanted_at` is when somebody wanted it last, on the monotonic clock as all times here."""

    name: str
    process: Child
    started_at: float
    wanted_at: float


class ScalingPlan(NamedTuple):
    """Bundles whose worker is to be started, and those whose is to be stopped."""

    start: list[str]
    stop: list[str]


def plan_scaling(
    wanted: Collection[str], served: Collection[str], last_wanted: dict[str, float], now: float
) -> ScalingPlan:
    """What to do when bundles are `wanted`, others' workers serve some, and ours were wanted last at those times."""
    start = sorted(set(wanted) - set(served) - last_wanted.keys())
    return ScalingPlan(
        start,
        [each for each, at in last_wanted.items() if each not in wanted and now - at >= LEAVE_S],
    )


@dataclass(kw_only=True)
class WorkerPool:
    """Looks every other second at what is wanted; a context manager, at whose end all its workers stop.

    `default` is the bundle of the workers that run anyway, which are named up to the number `num_workers`; `shares`
    says that the broker has shared subscriptions.
    """

    state: FleetHome
    default: str
    num_workers: int
    shares: bool
    _hired: dict[str, ManagedWorker] = field(default_factory=dict)
    _leaving: list[ManagedWorker] = field(default_factory=list)
    _next_look: float = 0.0

    def __enter__(self) -> Self:
        self._registry = self.state.registry()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        everyone = [*self._hired.values(), *self._leaving]
        for each in everyone:  # all drain at the same time
            each.process.ask_to_stop()
        for each in everyone:
            each.process.stop()
        self._registry.close()

    def tend(self) -> None:
        """Starts and stops workers if it is time to look; what fails is logged and tried again."""
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + LOOK_S
        try:
            self._look(now)
        except FleetError as error:
            log.warning("workers stay as they are: %s", error)

    def _look(self, now: float) -> None:
        self._leaving = [each for each in self._leaving if each.process.process.poll() is None]
        added = {row.bundle_id for row in self._registry.bundles()}
        wanted = (self._registry.wanted_bundles().keys() & added) - {self.default}
        for bundle_id, each in self._hired.items():
            if bundle_id in wanted:
                each.wanted_at = now
        ours = {each.name for each in (*self._hired.values(), *self._leaving)}
        workers = self._registry.serving_workers()
        served = [bundle_id for bundle_id, names in workers.items() if set(names) - ours]
        todo = plan_scaling(
            wanted,
            served,
            {bundle_id: each.wanted_at for bundle_id, each in self._hired.items()},
            now,
        )
        for bundle_id in todo.stop:
            self._stop(bundle_id)
        for bundle_id in todo.start:
            self._start(bundle_id, now)
        self._replace_ended(now)

    def _start(self, bundle_id: str, now: float) -> None:
        name = self._free_name()
        folder = worker_folder(self.state, name, shares=self.shares)
        threads = str(max(1, (os.cpu_count() or 1) // (self.num_workers + 1)))
        process = Child(
            f"worker {name}",
            (
                "cloud_broker_worker",
                "run",
                str(folder),
                "--bundle",
                str(self.state.bundles / bundle_id),
                "--drain-timeout",
                str(DRAIN_TIMEOUT_S),
                "--threads",
                threads,
            ),
        )
        self._hired[bundle_id] = ManagedWorker(name, process, now, now)
        _say(f"worker {name} starts for bundle {bundle_id} (process {process.process.pid})")

    def _stop(self, bundle_id: str) -> None:
        leaving = self._hired.pop(bundle_id)
        leaving.process.ask_to_stop()
        self._leaving.append(leaving)
        _say(f"worker {leaving.name} stops: nobody wants bundle {bundle_id} any more")

    def _replace_ended(self, now: float) -> None:
        for bundle_id, each in list(self._hired.items()):
            ended = each.process.process.poll()
            if ended is not None and now - each.started_at >= RESTART_S:
                _say(f"worker {each.name} ended with exit status {ended}; it is started again")
                del self._hired[bundle_id]
                self._start(bundle_id, now)

    def _free_name(self) -> str:
        """One that none of our workers has, nor an identity that was enrolled for another machine."""
        names = {each.name for each in (*self._hired.values(), *self._leaving)}
        for row in self._registry.identities():
            if not self.state.has_identity(row.name):
                names.add(row.name)
        number = self.num_workers + 1
        while worker_name(number) in names:
            number += 1
        return worker_name(number)


def _say(line: str) -> None:
    print(f"fleet: {line}", file=sys.stderr, flush=True)
