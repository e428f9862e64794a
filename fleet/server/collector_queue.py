"""What has arrived from devices and workers and is not stored yet: bounded memory between two threads."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from fleet.protocol.report import DeviceStatus, GenerationReport, WorkerStatus
from fleet.registry.stats.ingest import Key


class ReceivedStatus(NamedTuple):
    """A status of a device or a worker, heard `at`."""

    name: str
    status: DeviceStatus | WorkerStatus
    at: float


@dataclass
class Batch:
    """What one attempt stores; `turned_away` are devices that may send again now.

    With `is_new_link` nobody counts as online but those that the statuses say are.
    """

    is_new_link: bool = False
    statuses: list[ReceivedStatus] = field(default_factory=list)
    reports: dict[Key, GenerationReport] = field(default_factory=dict)
    turned_away: set[str] = field(default_factory=set)


class CollectorQueue:
    """At most `max_reports` reports, and of each device and worker what its statuses come to."""

    def __init__(self, max_reports: int) -> None:
        self._max_reports = max_reports
        self._changed = threading.Condition()
        self._reports: deque[tuple[Key, GenerationReport]] = deque()
        self._statuses: dict[str, list[ReceivedStatus]] = {}
        self._turned_away: set[str] = set()
        self._is_new_link = False
        self._closed = False

    def begin_link(self) -> None:
        """The broker may have forgotten those who left meanwhile, and says again who is there: forgets it, too."""
        with self._changed:
            self._statuses.clear()
            self._is_new_link = True
            self._changed.notify()

    def put_status(self, heard: ReceivedStatus) -> None:
        """A last will adds to the birth before it; a birth makes all before it old."""
        with self._changed:
            earlier = [] if heard.status.online else self._statuses.get(heard.name, [])
            self._statuses[heard.name] = [*(it for it in earlier if it.status.online), heard]
            self._changed.notify()

    def put_report(self, device: str, report: GenerationReport) -> bool:
        """False when there is no room; the device is among the `turned_away` once there is."""
        with self._changed:
            if len(self._reports) >= self._max_reports:
                self._turned_away.add(device)
                return False
            self._reports.append(((device, report.generation), report))
            self._changed.notify()
            return True

    def take(self, max_reports: int, timeout_s: float) -> Batch | None:
        """What has arrived, after `timeout_s` seconds perhaps nothing; None when it was closed and is empty."""
        with self._changed:
            if not self._has_any() and not self._closed:
                self._changed.wait(timeout_s)
            if self._closed and not self._has_any():
                return None
            batch = Batch(
                self._is_new_link, [heard for each in self._statuses.values() for heard in each]
            )
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
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _has_any(self) -> bool:
        return bool(self._is_new_link or self._statuses or self._reports)
