"""The workers that are online, from their retained status messages."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping
from typing import Final, Self

from fleet.errors import ProtocolError
from fleet.protocol import topics
from fleet.protocol.messages import Refused
from fleet.protocol.report import WorkerStatus, decode_status
from fleet.transport.base import Transport

log = logging.getLogger(__name__)

GRACE_S: Final = 1.0  # retained statuses arrive within this time after the link comes up


class WorkerDirectory:
    """The statuses of the workers that are online, by name.

    A worker that has restarted has another epoch. At each change a new mapping replaces `statuses`,
    and no mapping is modified, so any thread may read it.
    """

    def __init__(self, transport: Transport, on_change: Callable[[str], None]) -> None:
        self.statuses: Mapping[str, WorkerStatus] = {}
        self._changed = threading.Condition()
        self._up_since = time.monotonic()
        self._logged_mismatches: set[str] = set()
        self._on_change = on_change
        self._transport = transport

    def __enter__(self) -> Self:
        """Subscribe to the statuses of the workers."""
        self._transport.on_up(self._link_up)  # before any message arrives
        self._transport.subscribe(
            topics.WORKER_STATUS_FILTER, self._on_status, qos=1, retained=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._transport.unsubscribe(topics.WORKER_STATUS_FILTER)
        self._transport.off_up(self._link_up)

    def serves(self, bundle_id: str) -> bool:
        """Return whether a worker that is known now accepts sessions of the bundle."""
        return is_bundle_served(self.statuses, bundle_id)

    def why_none(self, bundle_id: str) -> str | None:
        """Return why no worker serves the bundle and what to do, or None if a worker serves it.

        Right after the link has come up, wait up to `GRACE_S` seconds for the retained statuses.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self.serves(bundle_id),
                max(0.0, self._up_since + GRACE_S - time.monotonic()),
            )
        statuses = self.statuses
        if is_bundle_served(statuses, bundle_id):
            return None
        if not statuses:
            return "no cloud worker is online; start one with 'fleet up'"
        served = {bundle for status in statuses.values() for bundle in status.bundle_ids}
        return (
            f"no cloud worker serves bundle {bundle_id}: {', '.join(sorted(statuses))} serve "
            f"{', '.join(sorted(served))}; use the same bundle on both sides"
        )

    def log_mismatch(self, refused: Refused) -> None:
        """Log that a worker refuses the device's protocol; log each reason only once."""
        if refused.message not in self._logged_mismatches:
            self._logged_mismatches.add(refused.message)
            log.warning("no cloud for this device: %s", refused.message)

    def _link_up(self) -> None:
        """Drop the statuses: the broker now sends the current ones."""
        with self._changed:
            self._up_since = time.monotonic()
            self.statuses = {}

    def _on_status(self, topic: str, payload: bytes) -> None:
        try:
            (worker,) = topics.parse_topic(topic, topics.WORKER_STATUS_FILTER)
            status = decode_status(payload, WorkerStatus)
        except ProtocolError as error:
            log.warning("status on %s dropped: %s", topic, error)
            return
        with self._changed:
            others = {name: other for name, other in self.statuses.items() if name != worker}
            self.statuses = {**others, worker: status} if status.online else others
            self._changed.notify_all()
        self._on_change(worker)


def is_bundle_served(
    workers: Mapping[str, WorkerStatus], bundle_id: str, *, excluded: Collection[str] = ()
) -> bool:
    """Return whether a worker that is not `excluded` accepts sessions of the bundle."""
    return any(
        bundle_id in status.bundle_ids and not status.draining
        for name, status in workers.items()
        if name not in excluded
    )
