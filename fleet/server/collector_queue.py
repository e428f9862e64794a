"""The collector's queue: statuses and reports that are not stored yet, in bounded memory."""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Final

from fleet.protocol.report import GenerationReport
from fleet.registry.stats.ingest import DeviceKey, ReceivedStatus

MAX_OF_DEVICE: Final = 512
"""The most reports of one device in the queue; a device has at most 128 in flight."""

PAUSE_S: Final = 2.0
"""The pause before a device may send again after it has sent too many reports."""


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

    One report of each device is taken in turn, so that no device waits for all reports of another.
    Any thread may call the methods.
    """

    def __init__(self, max_reports: int) -> None:
        self._max_reports = max_reports
        self._changed = threading.Condition()
        self._num_reports = 0
        self._reports: dict[str, deque[GenerationReport]] = {}
        self._statuses: dict[str, list[ReceivedStatus]] = {}
        self._turned_away: dict[str, float] = {}  # when each may send again
        self._is_new_link = False
        self._is_closed = False

    def begin_link(self) -> None:
        """Drop queued statuses after a reconnect; the broker resends the retained ones."""
        with self._changed:
            self._statuses.clear()
            self._is_new_link = True
            self._changed.notify()

    def put_status(self, received: ReceivedStatus) -> None:
        """Add a status: a birth replaces all earlier ones, a last will is put after the birth."""
        with self._changed:
            earlier = [] if received.status.online else self._statuses.get(received.name, [])
            births = [each for each in earlier if each.status.online]
            self._statuses[received.name] = [*births, received]
            self._changed.notify()

    def put_report(self, device: str, report: GenerationReport) -> bool:
        """Add a report; return False when the queue, or the device's share of it, is full.

        A batch has the device in `turned_away` once there is room again.
        """
        with self._changed:
            own = self._reports.get(device, ())
            if self._num_reports >= self._max_reports or len(own) >= MAX_OF_DEVICE:
                self._turn_away(device, PAUSE_S if own else 0.0)
                return False
            self._reports.setdefault(device, deque()).append(report)
            self._num_reports += 1
            self._changed.notify()
            return True

    def turn_away(self, device: str) -> None:
        """Let a device send again after a pause."""
        with self._changed:
            self._turn_away(device, PAUSE_S)

    def _turn_away(self, device: str, pause_s: float) -> None:
        self._turned_away.setdefault(device, time.monotonic() + pause_s)

    def take(self, max_reports: int, timeout_s: float) -> Batch | None:
        """Wait for messages, at most `timeout_s` seconds; return them, at most `max_reports`.

        Return None once the queue is closed and empty.
        """
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
                self._take_one(batch)
            if not self._reports:
                batch.turned_away = self._ready()
            return batch

    def _take_one(self, batch: Batch) -> None:
        """Move one report of the next device into the batch."""
        device = next(iter(self._reports))
        own = self._reports.pop(device)
        report = own.popleft()
        self._num_reports -= 1
        if own:
            self._reports[device] = own
        batch.reports[device, report.generation] = report

    def _ready(self) -> set[str]:
        now = time.monotonic()
        ready = {device for device, at in self._turned_away.items() if at <= now}
        for device in ready:
            del self._turned_away[device]
        return ready

    def close(self) -> None:
        """Let `take` return None once the queue is empty."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()

    def _has_any(self) -> bool:
        return bool(self._is_new_link or self._statuses or self._reports)
