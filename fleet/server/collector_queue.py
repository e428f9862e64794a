"""The collector's queue: statuses and reports that are not stored yet, in bounded memory."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from fleet.protocol.report import DeviceStatus, GenerationReport, WorkerStatus
from fleet.registry.stats.ingest import DeviceKey


class ReceivedStatus(NamedTuple):
    """A status of a device or a worker, received `at`."""

    name: str
    status: DeviceStatus | WorkerStatus
    at: float


@dataclass
class Batch:
    """The messages to store at once; `turned_away` are devices that may send again now.

    With `is_new_link` all devices and workers are offline, except those with an online status.
    """

    is_new_link: bool = False
    statuses: list[ReceivedStatus] = field(default_factory=list)
    reports: dict[DeviceKey, GenerationReport] = field(default_factory=dict)
    turned_away: set[str] = field(default_factory=set)


class CollectorQueue:
    """At most `max_reports` reports, and the newest statuses of each device and worker.

    Any thread may call its methods.
    """

    def __init__(self, max_reports: int) -> None:
        self._max_reports = max_reports
        self._changed = threading.Condition()
        self._reports: deque[tuple[DeviceKey, GenerationReport]] = deque()
        self._statuses: dict[str, list[ReceivedStatus]] = {}
        self._turned_away: set[str] = set()
        self._is_new_link = False
        self._is_closed = False

    def begin_link(self) -> None:
        """Drop queued statuses after a reconnect; the broker resends the retained ones."""
        with self._changed:
            self._statuses.clear()
            self._is_new_link = True
            self._changed.notify()

    def put_status(self, received: ReceivedStatus) -> None:
        """Add a status: a birth replaces all before it, a last will is added to the birth."""
        with self._changed:
            earlier = [] if received.status.online else self._statuses.get(received.name, [])
            births = [each for each in earlier if each.status.online]
            self._statuses[received.name] = [*births, received]
            self._changed.notify()

    def put_report(self, device: str, report: GenerationReport) -> bool:
        """Add a report; return False when the queue is full.

        The device is among `turned_away` once there is room again.
        """
        with self._changed:
            if len(self._reports) >= self._max_reports:
                self._turned_away.add(device)
                return False
            self._reports.append(((device, report.generation), report))
            self._changed.notify()
            return True

    def take(self, max_reports: int, timeout_s: float) -> Batch | None:
        """Return the queued messages, none after `timeout_s`; None once closed and empty."""
        with self._changed:
            if not self._has_any() and not self._is_closed:
                self._changed.wait(timeout_s)
            if self._is_closed and not self._has_any():
                return None
            statuses = [each for statuses in self._statuses.values() for each in statuses]
            batch = Batch(self._is_new_link, statuses)
            self._is_new_link = False
            self._statuses.clear()
            while self._reports and len(batch.reports) < max_reports:
                key, report = self._reports.popleft()
                batch.reports[key] = report
            if not self._reports:
                batch.turned_away = self._turned_away
                self._turned_away = set()
            return batch

    def close(self) -> None:
        """Let `take` return None once the queue is empty."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()

    def _has_any(self) -> bool:
        return bool(self._is_new_link or self._statuses or self._reports)
