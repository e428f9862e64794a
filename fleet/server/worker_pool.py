"""Additional workers that `fleet up` starts for the bundles in the devices' settings."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Self

from fleet.errors import FleetError
from fleet.server.child_process import Child
from fleet.server.home import FleetHome
from fleet.server.supervisor import (
    DEFAULT_SETTINGS,
    report,
    worker_folder,
    worker_name,
    worker_options,
)
from fleet.server.worker_settings import WorkerSettings

SCALE_S: Final = 2.0
IDLE_S: Final = 300.0
"""Time for which a worker is kept after its bundle was last desired."""

RESTART_S: Final = 30.0
"""Minimum time between two starts of a worker that ends by itself."""

log = logging.getLogger(__name__)


@dataclass
class ManagedWorker:
    """A worker of one bundle.

    `desired_at` is the time when the bundle was last desired, on the monotonic clock.
    """

    name: str
    process: Child
    started_at: float
    desired_at: float

    @property
    def exit_status(self) -> int | None:
        """The exit status of the process, or None while it runs."""
        return self.process.process.poll()


class ScalingPlan(NamedTuple):
    """The bundles whose workers to start and to stop."""

    start: list[str]
    stop: list[str]


def plan_scaling(
    desired: Collection[str], served: Collection[str], last_desired: dict[str, float], now: float
) -> ScalingPlan:
    """Decide which workers to start and to stop.

    `served` are the bundles of workers outside the pool. `last_desired` is the time at which the
    bundle of each worker in the pool was last desired.
    """
    start = sorted(set(desired) - set(served) - last_desired.keys())
    stop = [
        bundle_id
        for bundle_id, desired_at in last_desired.items()
        if bundle_id not in desired and now - desired_at >= IDLE_S
    ]
    return ScalingPlan(start, stop)


@dataclass(kw_only=True)
class WorkerPool:
    """A context manager that starts and stops workers, and stops all of them at its end.

    `default` is the bundle of the permanent workers. Their numbers are 1 to `num_workers`. `shares`
    means that the broker has shared subscriptions.
    """

    home: FleetHome
    default: str
    num_workers: int
    shares: bool
    settings: WorkerSettings = DEFAULT_SETTINGS
    _workers: dict[str, ManagedWorker] = field(default_factory=dict)  # by bundle
    _draining: list[ManagedWorker] = field(default_factory=list)
    _next_step: float = 0.0

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._registry = stack.enter_context(self.home.registry())
            stack.callback(self._stop_all)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def _all_workers(self) -> list[ManagedWorker]:
        return [*self._workers.values(), *self._draining]

    def _stop_all(self) -> None:
        for worker in self._all_workers:  # all drain at the same time
            worker.process.request_stop()
        for worker in self._all_workers:
            worker.process.stop()

    def step(self) -> None:
        """Start and stop workers, at most every `SCALE_S` seconds; log an error and try again."""
        now = time.monotonic()
        if now < self._next_step:
            return
        self._next_step = now + SCALE_S
        try:
            self._scale(now)
        except FleetError as error:
            log.warning("the number of workers is unchanged: %s", error)

    def _scale(self, now: float) -> None:
        self._draining = [each for each in self._draining if each.exit_status is None]
        desired = self._desired_bundles()
        for bundle_id, worker in self._workers.items():
            if bundle_id in desired:
                worker.desired_at = now
        last_desired = {bundle_id: each.desired_at for bundle_id, each in self._workers.items()}
        plan = plan_scaling(desired, self._bundles_of_others(), last_desired, now)
        for bundle_id in plan.stop:
            self._stop(bundle_id)
        for bundle_id in plan.start:
            self._start(bundle_id, now)
        self._replace_ended(now)

    def _desired_bundles(self) -> set[str]:
        rows = self._registry.rollouts.bundles()
        folders = {row.bundle_id: self.home.bundles / row.bundle_id for row in rows}
        # A bundle whose devices hold the whole model has no folder of that name.
        added = {bundle_id for bundle_id, path in folders.items() if (path / "cloud").is_dir()}
        return (self._registry.rollouts.desired_bundles().keys() & added) - {self.default}

    def _bundles_of_others(self) -> list[str]:
        our_names = {each.name for each in self._all_workers}
        workers = self._registry.rollouts.serving_workers()
        return [bundle_id for bundle_id, names in workers.items() if set(names) - our_names]

    def _start(self, bundle_id: str, now: float) -> None:
        name = self._free_name()
        arguments = [
            "cloud_broker_worker",
            "run",
            str(worker_folder(self.home, name, shares=self.shares)),
            *worker_options(self.settings, self.home.bundles / bundle_id, self.num_workers + 1),
        ]
        process = Child(f"worker {name}", arguments)
        self._workers[bundle_id] = ManagedWorker(name, process, now, now)
        report(f"worker {name} starts for bundle {bundle_id} (process {process.process.pid})")

    def _stop(self, bundle_id: str) -> None:
        worker = self._workers.pop(bundle_id)
        worker.process.request_stop()
        self._draining.append(worker)
        report(f"worker {worker.name} stops: no device needs bundle {bundle_id} any more")

    def _replace_ended(self, now: float) -> None:
        for bundle_id, worker in list(self._workers.items()):
            status = worker.exit_status
            if status is not None and now - worker.started_at >= RESTART_S:
                report(f"worker {worker.name} ended with exit status {status}; it is restarted")
                del self._workers[bundle_id]
                self._start(bundle_id, now)

    def _free_name(self) -> str:
        """Return a name that no worker of the pool and no identity on another machine has."""
        names = {each.name for each in self._all_workers}
        for row in self._registry.identities.all():
            if not self.home.has_identity(row.name):
                names.add(row.name)
        number = self.num_workers + 1
        while worker_name(number) in names:
            number += 1
        return worker_name(number)
