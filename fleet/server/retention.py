"""Retention: deletion of generations and events of alarms that are older than is configured."""

from __future__ import annotations

import logging
import threading
import time
from typing import Final, Self

from fleet.errors import RegistryError
from fleet.protocol.types import DAY_S
from fleet.registry.store import Registry

PERIOD_S: Final = 3600.0
PAUSE_S: Final = 0.2
CLOSE_S: Final = 5.0
BATCH_SIZE: Final = 500

log = logging.getLogger(__name__)


class Retention:
    """A thread that deletes old rows once an hour, for the length of a `with` block.

    It deletes a few at a time: generations, whose roll-ups stay, and events of alarms.
    """

    def __init__(self, registry: Registry, days: float) -> None:
        self._deletions = (registry.stats.delete_old_generations, registry.alarms.delete_old)
        self._max_age_s = days * DAY_S
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="retention", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(CLOSE_S)

    def _run(self) -> None:
        while not self._stop.is_set():
            has_more = False
            before = time.time() - self._max_age_s
            try:
                has_more = BATCH_SIZE in [delete(before, BATCH_SIZE) for delete in self._deletions]
            except RegistryError as error:
                log.warning("no old generation was deleted: %s", error)
            except Exception:  # the thread must go on
                log.exception("no old generation was deleted")
            self._stop.wait(PAUSE_S if has_more else PERIOD_S)
