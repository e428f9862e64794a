"""The reporter: each report is saved, published, and removed once the collector has it."""

from __future__ import annotations

import logging
import random
import sqlite3
import threading
import time
from collections import deque
from typing import Final, NamedTuple, Self

from edge_agent.reporting.report_outbox import ReportOutbox
from fleet.errors import LinkError, ProtocolError
from fleet.protocol import topics
from fleet.protocol.report import GenerationReport, ReportReceipt, decode_receipt, encode_report
from fleet.transport.base import Transport, run_guarded

log = logging.getLogger(__name__)

FIRST_WINDOW: Final = 4
MAX_WINDOW: Final = 128  # replies to prompts use the same link
SLOW_S: Final = 1.0  # a receipt that takes longer makes the window smaller
RETRY_S: Final = (5.0, 120.0)  # the first and the longest wait for a receipt
MAX_UNSAVED: Final = 1000  # reports in memory while the disk fails
MIN_PAUSE_S: Final = 0.05
STOP_S: Final = 5.0


class InFlight(NamedTuple):
    """A report that was sent and is not acknowledged; `sent_at` by the monotonic clock."""

    payload: bytes
    sent_at: float


class Reporter:
    """The delivery of one device's reports to the collector; a context manager with one thread.

    At most a window of reports is in flight. The window starts small. It grows with each receipt
    within `SLOW_S`, shrinks with each later one, and starts again when none arrives. So many
    devices that reconnect at once do not flood the collector.
    """

    def __init__(
        self, transport: Transport, outbox: ReportOutbox, retry_s: tuple[float, float] = RETRY_S
    ) -> None:
        self._transport = transport
        self._outbox = outbox
        self._min_retry_s, self._max_retry_s = retry_s
        self._new: deque[GenerationReport] = deque()
        self._receipts: deque[ReportReceipt] = deque()
        self._wake = threading.Event()
        self._stopping = False
        self._unsaved: dict[str, bytes] = {}  # generations are the keys here and in the next two
        self._acknowledged: set[str] = set()
        self._in_flight: dict[str, InFlight] = {}
        self._last_taken_id = 0
        self._disk_fails = False
        self._window = FIRST_WINDOW
        self._retry_s = self._min_retry_s
        self._thread = threading.Thread(
            target=self._run, name=f"report-{transport.name}", daemon=True
        )

    def __enter__(self) -> Self:
        self._thread.start()
        self._transport.subscribe(topics.device_reported(self._transport.name), self._on_receipt)
        self._transport.on_up(self._wake.set)
        return self

    def __exit__(self, *_: object) -> None:
        """Save the reports that are left, within `STOP_S` seconds."""
        self._transport.unsubscribe(topics.device_reported(self._transport.name))
        self._transport.off_up(self._wake.set)
        self._stopping = True
        self._wake.set()
        self._thread.join(STOP_S)

    def add(self, report: GenerationReport) -> None:
        """Deliver a report; this never blocks."""
        self._new.append(report)
        self._wake.set()

    def _on_receipt(self, topic: str, payload: bytes) -> None:
        try:
            self._receipts.append(decode_receipt(payload))
        except ProtocolError as error:
            log.warning("message on %s dropped: %s", topic, error)
        self._wake.set()

    # Everything below runs on the reporter's own thread.

    def _run(self) -> None:
        while not self._stopping:
            self._wake.wait(self._timeout_s())
            self._wake.clear()
            run_guarded(self._deliver, "reporting")
        run_guarded(self._deliver, "reporting")
        self._outbox.close()

    def _timeout_s(self) -> float:
        """Return the seconds until a report is sent again."""
        if not self._in_flight or not self._transport.is_up:
            return self._max_retry_s
        oldest = min(each.sent_at for each in self._in_flight.values())
        return max(MIN_PAUSE_S, oldest + self._retry_s - time.monotonic())

    def _deliver(self) -> None:
        """Process receipts, save new reports, send those that are due; one transaction on disk."""
        while self._receipts:
            self._process(self._receipts.popleft())
        while self._new:
            report = self._new.popleft()
            self._unsaved[report.generation] = encode_report(report)
        is_up = self._transport.is_up
        due = self._overdue() if is_up else {}
        try:
            due |= self._save(self._window - len(self._in_flight) if is_up else 0)
        except (sqlite3.Error, OSError) as error:
            self._continue_without_disk(error)
            due |= {
                generation: payload
                for generation, payload in self._unsaved.items()
                if generation not in self._in_flight
            }
        if is_up:
            self._send(due)

    def _process(self, receipt: ReportReceipt) -> None:
        if not receipt.stored and not receipt.refused:
            # The collector has started, and may have missed the reports in flight.
            self._in_flight.clear()
            self._send_all_again()
            return
        for generation, reason in receipt.refused.items():
            log.warning("the collector refused the report of generation %s: %s", generation, reason)
        slow = time.monotonic() - SLOW_S
        for generation in (*receipt.stored, *receipt.refused):
            self._acknowledged.add(generation)
            self._unsaved.pop(generation, None)
            if sent := self._in_flight.pop(generation, None):
                change = 1 if sent.sent_at > slow else -1
                self._window = min(MAX_WINDOW, max(1, self._window + change))
        self._retry_s = self._min_retry_s

    def _send_all_again(self) -> None:
        self._last_taken_id = 0
        self._window = FIRST_WINDOW
        self._retry_s = self._min_retry_s

    def _overdue(self) -> dict[str, bytes]:
        """Return the reports that have waited too long for a receipt; then double the wait."""
        latest = time.monotonic() - self._retry_s
        due = {
            generation: each.payload
            for generation, each in self._in_flight.items()
            if each.sent_at <= latest
        }
        if due:
            self._window = FIRST_WINDOW
            self._retry_s = min(self._max_retry_s, 2 * self._retry_s) * random.uniform(0.8, 1.0)
        return due

    def _save(self, room: int) -> dict[str, bytes]:
        """Update the outbox; return the next reports from it, at most `room`."""
        with self._outbox.transaction():
            self._outbox.remove(self._acknowledged)
            # After a failure of the disk, unsaved reports may have been sent from memory already.
            self._outbox.add(self._unsaved, sent=self._disk_fails)
            stored = self._outbox.take(self._last_taken_id, max(0, room))
        self._acknowledged.clear()
        self._unsaved.clear()
        if self._disk_fails:
            self._disk_fails = False
            log.warning("reports are kept on disk again")
        if stored:
            self._last_taken_id = stored[-1].id
        return {generation: payload for _, generation, payload in stored}

    def _continue_without_disk(self, error: Exception) -> None:
        if not self._disk_fails:
            self._disk_fails = True
            log.warning("%s", self._outbox.explain(error))
        self._last_taken_id = 0  # the repaired disk may have a new file
        while len(self._unsaved) > MAX_UNSAVED:
            lost = next(iter(self._unsaved))
            del self._unsaved[lost]
            self._in_flight.pop(lost, None)
            log.warning(
                "the report of generation %s is lost: there is no disk, and no collector", lost
            )

    def _send(self, reports: dict[str, bytes]) -> None:
        now = time.monotonic()
        sent = {generation: InFlight(payload, now) for generation, payload in reports.items()}
        self._in_flight.update(sent)
        try:
            for payload in reports.values():
                self._transport.publish(topics.device_stats(self._transport.name), payload)
        except LinkError as error:  # they are sent again after their wait
            log.info("reports wait: %s", error)
