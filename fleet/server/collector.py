"""The collector: what devices and workers publish of themselves and of their answers goes into the registry."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from types import TracebackType
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
    MAX_LABEL_LENGTH,
    DeviceStatus,
    ReportReceipt,
    WorkerStatus,
    decode_report,
    decode_status,
    encode_receipt,
    generation_of,
)
from fleet.registry.stats.ingest import IngestOutcome, Key
from fleet.registry.store import Registry
from fleet.server.collector_queue import Batch, CollectorQueue, ReceivedStatus
from fleet.transport.base import Transport

T = TypeVar("T")

MAX_WAITING: Final = 20_000  # reports in memory, about 1 KB each
MAX_BATCH: Final = 500
WAIT_S: Final = 60.0
RETRY_S: Final = (
    0.5,
    10.0,
)  # between two attempts at a registry that cannot answer, at first and at the most
CLOSE_S: Final = 5.0

log = logging.getLogger(__name__)


class Collector:
    """Listens to every device; a context manager with one thread, which stores what has arrived, many at once.

    A device keeps its reports until a receipt says that they are stored, or refused for good. So what does not fit into
    memory while the registry is away is dropped, and the device is told when there is room. The device's name is the
    topic's, which the broker guards, and never the payload's. What can never be stored is dropped with one line in the
    log, and harms nobody else. `reports` counts them: stored, repeated, refused, dropped.
    """

    def __init__(
        self, transport: Transport, registry: Registry, max_waiting: int = MAX_WAITING
    ) -> None:
        self.reports = Counter(stored=0, repeated=0, refused=0, dropped=0)
        self._transport = transport
        self._registry = registry
        self._inbox = CollectorQueue(max_waiting)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._store_all, name="collector", daemon=True)

    def __enter__(self) -> Self:
        """Raises RegistryError when the registry cannot answer."""
        self._transport.on_up(self._inbox.begin_link)
        self._registry.all_offline()
        self._inbox.take(0, 0.0)  # the link's beginning, of which nothing has come yet
        self._thread.start()
        self._transport.subscribe(topics.DEVICE_STATUS_FILTER, self._on_status, qos=1)
        self._transport.subscribe(topics.WORKER_STATUS_FILTER, self._on_worker, qos=1)
        self._transport.subscribe(topics.DEVICE_STATS_FILTER, self._on_report)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stores what has arrived, if it can within `CLOSE_S` seconds."""
        self._transport.off_up(self._inbox.begin_link)
        self._closing.set()
        self._inbox.close()
        self._thread.join(CLOSE_S)

    # What arrives: decided on the transport's thread, quickly.

    def _on_status(self, topic: str, payload: bytes) -> None:
        try:
            (device,) = topics.parse(topic, "d", "+", "status")
            self._inbox.put_status(
                ReceivedStatus(device, decode_status(payload, DeviceStatus), time.time())
            )
        except ProtocolError as error:
            _log_dropped(topic, error)

    def _on_worker(self, topic: str, payload: bytes) -> None:
        try:
            (worker,) = topics.parse(topic, "w", "+", "status")
            self._inbox.put_status(
                ReceivedStatus(worker, decode_status(payload, WorkerStatus), time.time())
            )
        except ProtocolError as error:
            _log_dropped(topic, error)

    def _on_report(self, topic: str, payload: bytes) -> None:
        try:
            (device,) = topics.parse(topic, "d", "+", "stats")
        except TopicError as error:
            _log_dropped(topic, error)
            return
        try:
            if not self._inbox.put_report(device, decode_report(payload)):
                self.reports["dropped"] += 1
        except ProtocolError as error:
            self.reports["refused"] += 1
            _log_dropped(topic, error)
            if generation := generation_of(payload):
                self._send_receipt(device, ReportReceipt(refused={generation: _reason(error)}))

    # What is stored: on the collector's own thread.

    def _store_all(self) -> None:
        while (batch := self._inbox.take(MAX_BATCH, WAIT_S)) is not None:
            try:
                self._store(batch)
            except (
                Exception
            ):  # the outermost boundary of a thread; devices send again what was in it
                log.exception(
                    "%d statuses and %d reports were dropped",
                    len(batch.statuses),
                    len(batch.reports),
                )

    def _store(self, batch: Batch) -> None:
        ready = set(batch.turned_away)
        if batch.is_new_link:
            self._insist(self._registry.all_offline)
        for name, status, at in batch.statuses:
            try:
                if isinstance(status, WorkerStatus):
                    self._insist(partial(self._registry.record_worker, name, status, at))
                    continue
                self._insist(partial(self._registry.record_status, name, status, at))
            except (UnknownDeviceError, ValueRefusedError) as error:
                _log_dropped(topics.device_status(name), error)
            else:
                ready.add(name)
        if batch.reports:
            self._acknowledge(self._insist(lambda: self._registry.record_reports(batch.reports)))
        for device in ready:
            self._send_receipt(device, ReportReceipt())

    def _insist(self, work: Callable[[], T]) -> T:
        """What `work` gives, once the registry can answer.

        Raises:
            RegistryError: the registry cannot answer, and we are closing.
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

    def _acknowledge(self, fates: dict[Key, IngestOutcome]) -> None:
        stored = defaultdict[str, list[str]](list)
        refused = defaultdict[str, dict[str, str]](dict)
        for (device, generation), fate in fates.items():
            if isinstance(fate, RegistryError):
                self.reports["refused"] += 1
                _log_dropped(topics.device_stats(device), fate)
                if isinstance(fate, ReportError):
                    refused[device][generation] = _reason(fate)
            else:
                self.reports["stored" if fate else "repeated"] += 1
                stored[device].append(generation)
        for device in stored | refused:
            self._send_receipt(device, ReportReceipt(tuple(stored[device]), refused[device]))

    def _send_receipt(self, device: str, receipt: ReportReceipt) -> None:
        """At QoS 0: who misses it sends the report again."""
        try:
            self._transport.publish(topics.device_reported(device), encode_receipt(receipt))
        except LinkError as error:
            log.info("no receipt for %s: %s", device, error)


def _pauses_s() -> Iterator[float]:
    pause_s, longest_s = RETRY_S
    while True:
        yield pause_s
        pause_s = min(2 * pause_s, longest_s)


def _reason(error: FleetError) -> str:
    return " ".join(str(error).split())[:MAX_LABEL_LENGTH]


def _log_dropped(topic: str, error: FleetError) -> None:
    log.warning("dropped a message on %.200r: %s", topic, " ".join(str(error).split()))
