"""Which workers are alive, from their retained status messages."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection
from typing import Final

from fleet.errors import ProtocolError
from fleet.protocol import topics
from fleet.protocol.report import WorkerStatus, decode_status
from fleet.transport.base import Transport

log = logging.getLogger(__name__)

GRACE_S: Final = 1.0  # retained statuses arrive this soon after the link came up


class WorkerDirectory:
    """The workers that say they are online. A worker that restarted has another epoch."""

    def __init__(self, transport: Transport, on_change: Callable[[str], None]) -> None:
        self._changed = threading.Condition()
        self._up_since = time.monotonic()
        self._online: dict[str, WorkerStatus] = {}
        self._on_change = on_change
        self._transport = transport
        transport.on_up(self._link_up)  # before anything comes
        transport.subscribe(topics.WORKER_STATUS_FILTER, self._on_status, qos=1, retained=True)

    def close(self) -> None:
        """Hears of them no more."""
        self._transport.unsubscribe(topics.WORKER_STATUS_FILTER)
        self._transport.off_up(self._link_up)

    def epoch(self, worker: str) -> int | None:
        """The epoch of a worker that is online, else None."""
        with self._changed:
            status = self._online.get(worker)
        return status.epoch if status else None

    def is_draining(self, worker: str) -> bool:
        """Whether a worker has said that it takes no more sessions."""
        with self._changed:
            status = self._online.get(worker)
        return status is not None and status.draining

    def serves(self, bundle_id: str, *, beside: Collection[str] = ()) -> bool:
        """Whether some worker `beside` those takes sessions of the bundle, as far as is known now."""
        with self._changed:
            return self._serves(bundle_id, beside)

    def why_none(self, bundle_id: str) -> str | None:
        """None when some worker serves the bundle; else why not, and what to do.

        Right after the link came up the answer waits for the retained statuses, at most `GRACE_S` seconds.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self._serves(bundle_id),
                max(0.0, self._up_since + GRACE_S - time.monotonic()),
            )
            if self._serves(bundle_id):
                return None
            online = dict(self._online)
        if not online:
            return "no cloud worker is online; start one with 'fleet up'"
        served = ", ".join(
            sorted({bundle for status in online.values() for bundle in status.bundle_ids})
        )
        return (
            f"no cloud worker serves bundle {bundle_id}: {', '.join(sorted(online))} serve {served}; "
            "use the same bundle on both sides"
        )

    def _serves(self, bundle_id: str, beside: Collection[str] = ()) -> bool:
        return any(
            bundle_id in status.bundle_ids and not status.draining
            for name, status in self._online.items()
            if name not in beside
        )

    def _link_up(self) -> None:
        """A broker may have forgotten workers that left while we were away; those that are there it names again."""
        with self._changed:
            self._up_since = time.monotonic()
            self._online.clear()

    def _on_status(self, topic: str, payload: bytes) -> None:
        try:
            (worker,) = topics.parse(topic, "w", "+", "status")
            status = decode_status(payload, WorkerStatus)
        except ProtocolError as error:
            log.warning("status on %s dropped: %s", topic, error)
            return
        with self._changed:
            if status.online:
                self._online[worker] = status
            else:
                self._online.pop(worker, None)
            self._changed.notify_all()
        self._on_change(worker)
