"""The collector: it stores the statuses and reports of devices and workers in the registry."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Final, Self, TypeVar

from fleet.errors import (
    FleetError,
    LinkError,
    ProtocolError,
    RegistryError,
    ReportError,
    TopicError,
    UnknownDeviceError,
)
from fleet.protocol import topics
from fleet.protocol.report import (
    DeviceStatus,
    ReportReceipt,
    StatusT,
    WorkerStatus,
    decode_report,
    decode_status,
    encode_receipt,
    generation_of,
)
from fleet.protocol.types import MAX_LABEL_LENGTH
from fleet.registry.stats.ingest import DeviceKey, IngestOutcome, ReceivedStatus
from fleet.registry.store import Registry
from fleet.server.answer_durations import AnswerDurations
from fleet.server.collector_queue import Batch, CollectorQueue
from fleet.server.report_admission import DeviceVolumes, ReportRules, report_cost
from fleet.server.shared_identities import SHARED_IDENTITY, SharedIdentityDetector
from fleet.transport.base import Transport, publish_or_log
from fleet.utils.rate_limited_log import RateLimitedLog

T = TypeVar("T")

MAX_WAITING: Final = 20_000  # reports in memory, about 1 KB each
MAX_BATCH: Final = 2000
WAIT_S: Final = 2.0
FIRST_RETRY_S: Final = 0.5  # between two attempts while the registry is not available
MAX_RETRY_S: Final = 10.0
CLOSE_S: Final = 5.0
BIRTH_RECEIPT_S: Final = 5.0  # least time between receipts for two births with the same epoch
LOG_S: Final = 10.0
MAX_LINES: Final = 20  # in `LOG_S` seconds
DEFAULT_RULES: Final = ReportRules()

log = logging.getLogger(__name__)


class Collector:
    """A subscriber to every device and worker; a context manager with one thread.

    The thread stores what has arrived, many messages at once. A device keeps its reports until a
    receipt names them as stored, or as refused for good. So the collector may drop reports when its
    memory is full, for example while the registry is away. When there is room again, the device
    gets an empty receipt and sends its reports again. The device's name comes from the topic, never
    from the payload, because the broker checks that the sender may publish on this topic. A message
    that can never be stored is dropped with a line in the log; the other messages of its batch are
    stored.

    `rules` are the bounds of a plausible report. `reports` counts reports: stored, repeated,
    refused, dropped; `durations` has the times of those stored. The thread calls `on_cycle`, for a
    watchdog, before each batch and before each attempt to use the registry. The longest pause
    between two calls is `WAIT_S` seconds, or `MAX_RETRY_S` while the registry is away.
    """

    def __init__(
        self,
        transport: Transport,
        registry: Registry,
        max_waiting: int = MAX_WAITING,
        rules: ReportRules = DEFAULT_RULES,
    ) -> None:
        self.reports = Counter(stored=0, repeated=0, refused=0, dropped=0)
        self.durations = AnswerDurations()
        self._transport = transport
        self._stats = registry.stats
        self._audit_log = registry.audit_log
        self._shared_identities = SharedIdentityDetector()
        self._rules = rules
        self._volumes = DeviceVolumes()
        self._births: dict[str, tuple[int, float]] = {}  # the last acknowledged birth: epoch, time
        self._log = RateLimitedLog(log, LOG_S, MAX_LINES)
        self._queue = CollectorQueue(max_waiting)
        self._closing = threading.Event()
        self.on_cycle: Callable[[], None] = lambda: None
        self._thread = threading.Thread(target=self._store_all, name="collector", daemon=True)

    def __enter__(self) -> Self:
        """Start to collect.

        Raises:
            RegistryError: the registry is not available.
        """
        self._transport.on_up(self._queue.begin_link)
        self._stats.mark_all_offline()
        # All devices and workers are marked offline now. Drop the queue's mark of a new link, which
        # `on_up` may have set, so that they are not marked again.
        self._queue.take(0, 0.0)
        self._thread.start()
        self._transport.subscribe(topics.DEVICE_STATUS_FILTER, self._on_status, qos=1)
        self._transport.subscribe(topics.WORKER_STATUS_FILTER, self._on_worker, qos=1)
        self._transport.subscribe(topics.DEVICE_STATS_FILTER, self._on_report)
        return self

    def __exit__(self, *_: object) -> None:
        """Store what has arrived, within `CLOSE_S` seconds."""
        self._transport.off_up(self._queue.begin_link)
        self._closing.set()
        self._queue.close()
        self._thread.join(CLOSE_S)

    # Messages arrive on the transport's thread, which must not block.

    def _on_status(self, topic: str, payload: bytes) -> None:
        if not payload:  # the server has cleared it
            return
        self._queue_status(topic, payload, topics.DEVICE_STATUS_FILTER, DeviceStatus)

    def _on_worker(self, topic: str, payload: bytes) -> None:
        self._queue_status(topic, payload, topics.WORKER_STATUS_FILTER, WorkerStatus)

    def _queue_status(
        self, topic: str, payload: bytes, topic_filter: str, kind: type[StatusT]
    ) -> None:
        try:
            (name,) = topics.parse_topic(topic, topic_filter)
            status = decode_status(payload, kind)
        except ProtocolError as error:
            self._log_dropped(topic, error)
        else:
            self._queue.put_status(ReceivedStatus(name, status, time.time()))

    def _on_report(self, topic: str, payload: bytes) -> None:
        try:
            (device,) = topics.parse_topic(topic, topics.DEVICE_STATS_FILTER)
        except TopicError as error:
            self._log_dropped(topic, error)
            return
        now = time.monotonic()
        if not self._volumes.has_left(device, now):
            self._queue.turn_away(device)
            self.reports["dropped"] += 1
            return
        try:
            report = decode_report(payload)
            self._volumes.charge(device, report_cost(payload, report), now)
            self._rules.check(report, time.time())
        except (ProtocolError, ReportError) as error:
            self._volumes.charge(device, report_cost(payload), now)
            self._refuse(topic, device, payload, error)
            return
        if not self._queue.put_report(device, report):
            self.reports["dropped"] += 1

    def _refuse(self, topic: str, device: str, payload: bytes, error: FleetError) -> None:
        self.reports["refused"] += 1
        self._log_dropped(topic, error)
        if generation := generation_of(payload):
            self._send_receipt(device, ReportReceipt(refused={generation: _reason(error)}))

    # Messages are stored on the collector's own thread.

    def _store_all(self) -> None:
        while (batch := self._queue.take(MAX_BATCH, WAIT_S)) is not None:
            self.on_cycle()
            try:
                self._store(batch)
            except Exception:  # the thread must go on; devices send these reports again
                log.exception(
                    "%d statuses and %d reports were dropped",
                    len(batch.statuses),
                    len(batch.reports),
                )

    def _store(self, batch: Batch) -> None:
        ready = set(batch.turned_away)
        if batch.is_new_link:
            self._births.clear()
            self._retry(self._stats.mark_all_offline)
        if batch.statuses:
            ready |= self._store_statuses(batch.statuses)
        if batch.reports:
            outcomes = self._retry(lambda: self._stats.record_reports(batch.reports))
            for key, outcome in outcomes.items():
                if outcome is True:
                    self.durations.add(batch.reports[key])
            self._acknowledge(outcomes)
        for device in ready:
            self._send_receipt(device, ReportReceipt())

    def _store_statuses(self, statuses: Sequence[ReceivedStatus]) -> set[str]:
        """Store statuses; return the devices that get a receipt for their birth.

        A device sends all its reports again after such a receipt. So it gets at most one in
        `BIRTH_RECEIPT_S` seconds, unless its epoch or the collector's link is new.
        """
        refused = self._retry(lambda: self._stats.record_statuses(statuses))
        for name, error in refused.items():
            self._log_dropped(topics.device_status(name), error)
            if isinstance(error, UnknownDeviceError):
                self._clear_status(name)
        stored = [each for each in statuses if each.name not in refused]
        for received in stored:
            self._check_epoch(received)
        now = time.monotonic()
        return {each.name for each in stored if self._is_receipt_due(each, now)}

    def _clear_status(self, device: str) -> None:
        """Clear the retained status of a device that is not enrolled, such as a deleted one."""
        publish_or_log(self._transport, topics.device_status(device), b"", qos=1, retain=True)

    def _is_receipt_due(self, received: ReceivedStatus, now: float) -> bool:
        name, status, _ = received
        if not isinstance(status, DeviceStatus) or not status.online:
            return False
        epoch, at = self._births.get(name, (None, now))
        is_due = epoch != status.epoch or now - at >= BIRTH_RECEIPT_S
        if is_due:
            self._births[name] = (status.epoch, now)
        return is_due

    def _check_epoch(self, received: ReceivedStatus) -> None:
        name, status, at = received
        if not status.online or not self._shared_identities.observe(name, status.epoch, at):
            return
        log.warning(
            "two processes use the identity of %s and disconnect each other; stop one of them, or "
            "enrol the second machine under a name of its own",
            name,
        )
        self._retry(partial(self._audit_log.add, SHARED_IDENTITY, name))

    def _retry(self, work: Callable[[], T]) -> T:
        """Return the result of `work`, once the registry is available.

        Raises:
            RegistryError: the registry is not available, and the collector is closing.
        """
        for attempt, pause_s in enumerate(_pauses_s()):
            self.on_cycle()
            try:
                result = work()
            except RegistryError as error:
                if attempt == 0:
                    log.warning("%s; trying again", error)
                if self._closing.wait(pause_s):
                    raise
            else:
                if attempt:
                    log.warning("the registry is available again")
                return result
        raise AssertionError("there is always another pause")

    def _acknowledge(self, outcomes: dict[DeviceKey, IngestOutcome]) -> None:
        stored = defaultdict[str, list[str]](list)
        refused = defaultdict[str, dict[str, str]](dict)
        for (device, generation), outcome in outcomes.items():
            if isinstance(outcome, RegistryError):
                self.reports["refused"] += 1
                self._log_dropped(topics.device_stats(device), outcome)
                if isinstance(outcome, ReportError):
                    refused[device][generation] = _reason(outcome)
            else:
                self.reports["stored" if outcome else "repeated"] += 1
                stored[device].append(generation)
        for device in stored | refused:
            self._send_receipt(device, ReportReceipt(tuple(stored[device]), refused[device]))

    def _send_receipt(self, device: str, receipt: ReportReceipt) -> None:
        """Publish a receipt at QoS 0: a device that misses it sends the report again."""
        try:
            self._transport.publish(topics.device_reported(device), encode_receipt(receipt))
        except LinkError as error:
            log.info("did not send a receipt to %s: %s", device, error)

    def _log_dropped(self, topic: str, error: FleetError) -> None:
        self._log.warning("dropped a message on %.200r: %s", topic, error)


def _pauses_s() -> Iterator[float]:
    pause_s = FIRST_RETRY_S
    while True:
        yield pause_s
        pause_s = min(2 * pause_s, MAX_RETRY_S)


def _reason(error: FleetError) -> str:
    return " ".join(str(error).split())[:MAX_LABEL_LENGTH]
