"""The collector: it stores the statuses and reports of devices and workers in the registry."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
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
    ValueRefusedError,
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
from fleet.registry.stats.ingest import DeviceKey, IngestOutcome
from fleet.registry.store import Registry
from fleet.server.collector_queue import Batch, CollectorQueue, ReceivedStatus
from fleet.transport.base import Transport

T = TypeVar("T")

MAX_WAITING: Final = 20_000  # reports in memory, about 1 KB each
MAX_BATCH: Final = 500
WAIT_S: Final = 60.0
FIRST_RETRY_S: Final = 0.5  # between two attempts at a registry that cannot answer
MAX_RETRY_S: Final = 10.0
CLOSE_S: Final = 5.0

log = logging.getLogger(__name__)


class Collector:
    """A subscriber to every device and worker; a context manager with one thread.

    The thread stores what has arrived, many messages at once. A device keeps its reports until a
    receipt says that they are stored, or refused for good. So reports that do not fit into memory
    while the registry cannot answer are dropped, and the device is notified when there is room. The
    device's name is that of the topic, which the broker guards, and never that of the payload. A
    message that can never be stored is dropped with one line in the log, and harms no other.
    `reports` counts reports: stored, repeated, refused, dropped.
    """

    def __init__(
        self, transport: Transport, registry: Registry, max_waiting: int = MAX_WAITING
    ) -> None:
        self.reports = Counter(stored=0, repeated=0, refused=0, dropped=0)
        self._transport = transport
        self._stats = registry.stats
        self._queue = CollectorQueue(max_waiting)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._store_all, name="collector", daemon=True)

    def __enter__(self) -> Self:
        """Start to collect.

        Raises:
            RegistryError: the registry cannot answer.
        """
        self._transport.on_up(self._queue.begin_link)
        self._stats.mark_all_offline()
        self._queue.take(0, 0.0)  # the new link, which has delivered nothing yet
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
            _log_dropped(topic, error)
        else:
            self._queue.put_status(ReceivedStatus(name, status, time.time()))

    def _on_report(self, topic: str, payload: bytes) -> None:
        try:
            (device,) = topics.parse_topic(topic, topics.DEVICE_STATS_FILTER)
        except TopicError as error:
            _log_dropped(topic, error)
            return
        try:
            if not self._queue.put_report(device, decode_report(payload)):
                self.reports["dropped"] += 1
        except ProtocolError as error:
            self.reports["refused"] += 1
            _log_dropped(topic, error)
            if generation := generation_of(payload):
                self._send_receipt(device, ReportReceipt(refused={generation: _reason(error)}))

    # They are stored on the collector's own thread.

    def _store_all(self) -> None:
        while (batch := self._queue.take(MAX_BATCH, WAIT_S)) is not None:
            try:
                self._store(batch)
            except Exception:  # the outermost boundary of a thread; devices send the batch again
                log.exception(
                    "%d statuses and %d reports were dropped",
                    len(batch.statuses),
                    len(batch.reports),
                )

    def _store(self, batch: Batch) -> None:
        ready = set(batch.turned_away)
        if batch.is_new_link:
            self._retry(self._stats.mark_all_offline)
        for received in batch.statuses:
            if self._store_status(received) and isinstance(received.status, DeviceStatus):
                ready.add(received.name)
        if batch.reports:
            self._acknowledge(self._retry(lambda: self._stats.record_reports(batch.reports)))
        for device in ready:
            self._send_receipt(device, ReportReceipt())

    def _store_status(self, received: ReceivedStatus) -> bool:
        """Store a status; return False when it can never be stored."""
        name, status, at = received
        try:
            if isinstance(status, WorkerStatus):
                self._retry(partial(self._stats.record_worker, name, status, at))
            else:
                self._retry(partial(self._stats.record_status, name, status, at))
        except (UnknownDeviceError, ValueRefusedError) as error:
            _log_dropped(topics.device_status(name), error)
            return False
        return True

    def _retry(self, work: Callable[[], T]) -> T:
        """Return the result of `work`, once the registry can answer.

        Raises:
            RegistryError: the registry cannot answer, and the collector is closing.
            UnknownDeviceError, ValueRefusedError: as the registry.
        """
        for attempt, pause_s in enumerate(_pauses_s()):
            try:
                result = work()
            except (UnknownDeviceError, ValueRefusedError):
                raise
            except RegistryError as error:
                if attempt == 0:
                    log.warning("%s; trying again until it can", error)
                if self._closing.wait(pause_s):
                    raise
            else:
                if attempt:
                    log.warning("the registry answers again")
                return result
        raise AssertionError("there is always another pause")

    def _acknowledge(self, outcomes: dict[DeviceKey, IngestOutcome]) -> None:
        stored = defaultdict[str, list[str]](list)
        refused = defaultdict[str, dict[str, str]](dict)
        for (device, generation), outcome in outcomes.items():
            if isinstance(outcome, RegistryError):
                self.reports["refused"] += 1
                _log_dropped(topics.device_stats(device), outcome)
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
            log.info("no receipt for %s: %s", device, error)


def _pauses_s() -> Iterator[float]:
    pause_s = FIRST_RETRY_S
    while True:
        yield pause_s
        pause_s = min(2 * pause_s, MAX_RETRY_S)


def _reason(error: FleetError) -> str:
    return " ".join(str(error).split())[:MAX_LABEL_LENGTH]


def _log_dropped(topic: str, error: FleetError) -> None:
    log.warning("dropped a message on %.200r: %s", topic, " ".join(str(error).split()))
