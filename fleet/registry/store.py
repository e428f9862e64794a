"""The registry: the one place that knows who was enrolled and what was counted."""

from __future__ import annotations

import getpass
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from sqlalchemy import Engine, SQLColumnExpression, func, select, update
from sqlalchemy.orm import Session

from fleet.protocol.report import DeviceStatus, GenerationReport, WorkerStatus
from fleet.registry.audit import audit_log, newest_change
from fleet.registry.database import open_database
from fleet.registry.desired_state import DesiredStateRepository
from fleet.registry.identities.devices import check_device, is_device, is_online
from fleet.registry.identities.grants import all_tags
from fleet.registry.identities.repository import IdentityRepository
from fleet.registry.identities.states import state_at
from fleet.registry.models import (
    GenerationRecord,
    IdentityRecord,
    SessionRecord,
    StatusRecord,
    WorkerRecord,
)
from fleet.registry.results import (
    AuditRow,
    BundleStats,
    DeviceRow,
    GroupStats,
    HourStats,
    SessionRow,
    StatsRow,
    WorkerRow,
)
from fleet.registry.stats.ingest import (
    IngestOutcome,
    Key,
    store_report,
    store_reports,
    store_status,
    store_worker,
)
from fleet.registry.stats.queries import By, StatsQuery
from fleet.registry.stats.summaries import device_stats, grouped_stats
from fleet.registry.transactions import Transactions
from fleet.server.retention import forget


class Registry(IdentityRepository, DesiredStateRepository):
    """One database. Every method is one transaction; any thread, and several processes, may call at once.

    `actor` is who makes the changes that go into the audit log.
    """

    def __init__(self, engine: Engine, actor: str) -> None:
        super().__init__(Transactions(engine), actor)
        self._engine = engine

    @classmethod
    def open(cls, url_or_path: str | Path, actor: str | None = None) -> Registry:
        """Opens a SQLite file, or a database by its SQLAlchemy URL; makes or migrates its tables.

        Raises:
            RegistryError: it cannot be opened.
            MissingExtraError: its driver is not installed.
        """
        return cls(
            open_database(url_or_path), actor or f"{getpass.getuser()}@{socket.gethostname()}"
        )

    def close(self) -> None:
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def record_status(self, device: str, status: DeviceStatus, at: float) -> None:
        """Keeps what a device says of itself, heard at `at`. A last will says no more than that it is gone.

        Raises:
            UnknownDeviceError: nobody enrolled it.
        """
        self._transactions.write(lambda db: store_status(db, device, status, at))

    def newest_change(self) -> int:
        """A number that grows with every change in the audit log."""
        with self._transactions.reading() as db:
            return newest_change(db)

    def audit_log(
        self, subject: str | None = None, since: float | None = None, limit: int = 100
    ) -> list[AuditRow]:
        """The latest changes, newest first: of one subject, and at `since` or later, where they are given."""
        with self._transactions.reading() as db:
            return audit_log(db, subject, since, limit)

    def all_offline(self) -> None:
        """Counts devices and workers as offline until they are heard again: for the start, when nobody has listened."""

        def work(db: Session) -> None:
            db.execute(update(StatusRecord).values(online=False))
            db.execute(update(WorkerRecord).values(online=False))

        self._transactions.write(work)

    def record_worker(self, worker: str, status: WorkerStatus, at: float) -> None:
        """Keeps what a worker says of itself, heard at `at`, if it was enrolled."""
        self._transactions.write(lambda db: store_worker(db, worker, status, at))

    def record_report(self, device: str, report: GenerationReport) -> bool:
        """Stores one answer's counts; False when this report has come before.

        Raises:
            UnknownDeviceError: nobody enrolled the device.
            ReportError: it can never be stored; its sources do not add up to the tokens, for instance.
        """
        return self._transactions.write(lambda db: store_report(db, device, report))

    def record_reports(self, reports: dict[Key, GenerationReport]) -> dict[Key, IngestOutcome]:
        """Stores reports by device and generation in one transaction; what became of each."""
        return self._transactions.write(lambda db: store_reports(db, reports))

    def workers(self) -> list[WorkerRow]:
        """Every worker that was ever heard, by name."""
        with self._transactions.reading() as db:
            return [
                WorkerRow(
                    worker=row.worker,
                    online=row.online,
                    draining=row.draining,
                    bundle_ids=tuple(row.bundle_ids),
                    num_sessions=row.num_sessions,
                    version=row.version,
                    last_seen=row.last_seen,
                )
                for row in db.scalars(select(WorkerRecord).order_by(WorkerRecord.worker))
            ]

    def devices(self) -> list[DeviceRow]:
        """Every enrolled device, by name."""
        query = (
            select(IdentityRecord, StatusRecord, is_online())
            .outerjoin(StatusRecord, StatusRecord.device == IdentityRecord.name)
            .where(is_device())
            .order_by(IdentityRecord.name)
        )
        now = time.time()
        with self._transactions.reading() as db:
            tags = all_tags(db)
            return [
                DeviceRow(
                    device=identity.name,
                    group=identity.group,
                    online=bool(online),
                    mode=status.mode if status else "",
                    bundle_id=status.bundle_id if status else "",
                    version=status.version if status else "",
                    last_seen=status.last_seen if status else None,
                    not_after=identity.not_after,
                    config_version=status.config_version if status else 0,
                    config_error=status.config_error if status else "",
                    state=state_at(identity.state, identity.not_after, now),
                    tags=tags.get(identity.name, {}),
                )
                for identity, status, online in db.execute(query)
            ]

    def device(self, name: str) -> DeviceRow:
        """Raises UnknownDeviceError when nobody enrolled `name`."""
        with self._transactions.reading() as db:
            check_device(db, name)
        return next(row for row in self.devices() if row.device == name)

    def stats(
        self,
        device: str | None = None,
        since: float | None = None,
        *,
        group: str | None = None,
        now: float | None = None,
    ) -> list[StatsRow]:
        """What devices' answers add up to, a row for each device; only of those that began at `since` or later.

        Raises:
            UnknownDeviceError: nobody enrolled `device`.
        """
        with self._transactions.reading() as db:
            return device_stats(
                db, StatsQuery(now=now or time.time(), since=since, device=device, group=group)
            )

    def stats_by(
        self,
        by: By,
        device: str | None = None,
        since: float | None = None,
        *,
        group: str | None = None,
        now: float | None = None,
    ) -> list[GroupStats] | list[BundleStats] | list[HourStats]:
        """The same, a row for each group, bundle or hour that has answers.

        Raises:
            UnknownDeviceError: nobody enrolled `device`.
        """
        with self._transactions.reading() as db:
            return grouped_stats(
                db, by, StatsQuery(now=now or time.time(), since=since, device=device, group=group)
            )

    def sessions(self, device: str | None = None, limit: int = 50) -> list[SessionRow]:
        """The latest `limit` sessions, newest first.

        Raises:
            UnknownDeviceError: nobody enrolled `device`.
        """
        query = (
            select(
                SessionRecord.session,
                SessionRecord.device,
                SessionRecord.worker,
                SessionRecord.opened_at,
                _total(GenerationRecord.answers),
                _total(GenerationRecord.tokens),
                _total(GenerationRecord.bytes_up),
                _total(GenerationRecord.bytes_down),
            )
            .join(GenerationRecord, GenerationRecord.session_id == SessionRecord.id)
            .group_by(SessionRecord.id)
            .order_by(SessionRecord.opened_at.desc(), SessionRecord.id.desc())
            .limit(limit)
        )
        with self._transactions.reading() as db:
            if device is not None:
                check_device(db, device)
                query = query.where(SessionRecord.device == device)
            return [
                SessionRow(
                    session=row[0],
                    device=row[1],
                    worker=row[2],
                    opened_at=row[3],
                    generations=int(row[4]),
                    tokens=int(row[5]),
                    bytes_up=int(row[6]),
                    bytes_down=int(row[7]),
                )
                for row in db.execute(query)
            ]

    def forget_before(self, recorded_before: float, limit: int) -> int:
        """Deletes at most `limit` generations that were recorded before then, with the sessions that they leave empty.

        Returns how many went. Roll-ups, and so the statistics of whole hours, stay.
        """
        return self._transactions.write(lambda db: forget(db, recorded_before, limit))


def _total(column: SQLColumnExpression[int]) -> SQLColumnExpression[int]:
    return func.coalesce(func.sum(column), 0)
