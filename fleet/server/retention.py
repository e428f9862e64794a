"""Retention: generations older than the configuration allows go, a few at a time; their roll-ups stay."""

from __future__ import annotations

import logging
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from sqlalchemy import delete, exists, select
from sqlalchemy.orm import Session

from fleet.errors import RegistryError
from fleet.registry.models import GenerationRecord, SessionRecord, TokenCount

if TYPE_CHECKING:
    from fleet.registry.store import Registry

DAY_S: Final = 86_400.0
PASS_S: Final = 3600.0
PAUSE_S: Final = 0.2
CLOSE_S: Final = 5.0
BATCH: Final = 500

log = logging.getLogger(__name__)


def forget(db: Session, before: float, limit: int) -> int:
    """Deletes the oldest generations that were recorded before `before`, and the sessions that have none left.

    Returns how many went; fewer than `limit` means that no more are left.
    """
    old = select(GenerationRecord.id).where(GenerationRecord.recorded_at < before)
    ids = db.scalars(old.order_by(GenerationRecord.recorded_at).limit(limit)).all()
    sessions = select(GenerationRecord.session_id).where(GenerationRecord.id.in_(ids)).distinct()
    touched = [id_ for id_ in db.scalars(sessions) if id_ is not None]
    db.execute(delete(TokenCount).where(TokenCount.generation_id.in_(ids)))
    db.execute(delete(GenerationRecord).where(GenerationRecord.id.in_(ids)))
    is_used = exists().where(GenerationRecord.session_id == SessionRecord.id)
    db.execute(delete(SessionRecord).where(SessionRecord.id.in_(touched), ~is_used))
    return len(ids)


class Retention:
    """A thread that forgets once an hour, for the length of a `with` block."""

    def __init__(self, registry: Registry, days: float) -> None:
        self._registry = registry
        self._days = days
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="retention", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join(CLOSE_S)

    def _run(self) -> None:
        while not self._stop.is_set():
            num_forgotten = 0
            try:
                num_forgotten = self._registry.forget_before(
                    time.time() - self._days * DAY_S, BATCH
                )
            except RegistryError as error:
                log.warning("nothing was forgotten this time: %s", error)
            except Exception:  # the outermost boundary of a thread
                log.exception("nothing was forgotten this time")
            self._stop.wait(PAUSE_S if num_forgotten == BATCH else PASS_S)
