"""The collector: what devices publish of themselves and of their answers goes into the registry."""

from __future__ import annotations

import logging
import time

from fleet import topics
from fleet.errors import FleetError
from fleet.registry.store import Registry
from fleet.report import DeviceStatus, decode_report, decode_status
from fleet.transport import Transport

log = logging.getLogger(__name__)


class Collector:
    """Listens to every device, from its creation until the transport is closed.

    The device's name is the topic's, which the broker guards, and never the payload's. What cannot be stored is
    dropped with one line in the log, and harms nobody else.
    """

    def __init__(self, transport: Transport, registry: Registry) -> None:
        self._registry = registry
        registry.all_offline()
        transport.subscribe(topics.DEVICE_STATUS_FILTER, self._on_status, qos=1)
        transport.subscribe(topics.DEVICE_STATS_FILTER, self._on_report, qos=1)

    def _on_status(self, topic: str, payload: bytes) -> None:
        try:
            (device,) = topics.parse(topic, "d", "+", "status")
            self._registry.record_status(device, decode_status(payload, DeviceStatus), time.time())
        except FleetError as error:
            _log_dropped(topic, error)

    def _on_report(self, topic: str, payload: bytes) -> None:
        try:
            (device,) = topics.parse(topic, "d", "+", "stats")
            if not self._registry.record_report(device, decode_report(payload)):
                log.debug("a report on %s came twice and counts once", topic)
        except FleetError as error:
            _log_dropped(topic, error)


def _log_dropped(topic: str, error: FleetError) -> None:
    log.warning("dropped a message on %.200r: %s", topic, " ".join(str(error).split()))
