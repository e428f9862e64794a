"""Retention: deletion of the generations that are older than the configuration allows."""

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
    """A thread that deletes old generations once an hour, for the length of a `with` block.

    It deletes a few at a time; their roll-ups stay.
    """

    def __init__(self, registry: Registry, days: float) -> None:
        self._stats = registry.stats
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
            num_deleted = 0
            before = time.time() - self._max_age_s
            try:
                num_deleted = self._stats.delete_old_generations(before, BATCH_SIZE)
            except RegistryError as error:
                log.warning("no old generation was deleted: %s", error)
            except Exception:  # the thread must go on
                log.exception("no old generation was deleted")
            self._stop.wait(PAUSE_S if num_deleted == BATCH_SIZE else PERIOD_S)
