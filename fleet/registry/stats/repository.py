"""The repository of statuses, reports and statistics."""

from __future__ import annotations

import time
from collections.abc import Sequence

from msgspec.structs import replace
from sqlalchemy import SQLColumnExpression, delete, exists, func, select, tuple_, update
from sqlalchemy.orm import Session

from fleet.errors import RegistryError
from fleet.protocol.report import DeviceStatus, GenerationReport, WorkerStatus
from fleet.registry.identities.devices import check_device, is_device, is_online
from fleet.registry.identities.grants import tags_by_device
from fleet.registry.identities.lifecycle import state_at
from fleet.registry.models import (
    BundleRecord,
    GenerationRecord,
    IdentityRecord,
    SessionRecord,
    StatusRecord,
    TokenCount,
    WorkerRecord,
)
from fleet.registry.results import (
    BundleStats,
    DeviceRow,
    GroupStats,
    HourStats,
    SessionRow,
    StatsRow,
    WorkerRow,
)
from fleet.registry.stats.device_pages import DeviceFilter, DevicePage, page_of_devices
from fleet.registry.stats.ingest import (
    DeviceKey,
    IngestOutcome,
    ReceivedStatus,
    store_reports,
    store_statuses,
)
from fleet.registry.stats.queries import By, StatsQuery
from fleet.registry.stats.summaries import grouped_stats, stats_per_device
from fleet.registry.transactions import Repository


class StatsRepository(Repository):
    """The statuses of devices and workers, and the counts of answers.

    Each method is one transaction.
    """

    def record_status(self, device: str, status: DeviceStatus, at: float) -> None:
        """Store a device's status, received `at`; of a last will, only that it is offline.

        Raises:
            UnknownDeviceError: it is not enrolled.
            ValueRefusedError: the database does not accept a value.
        """
        for error in self.record_statuses([ReceivedStatus(device, status, at)]).values():
            raise error

    def record_worker(self, worker: str, status: WorkerStatus, at: float) -> None:
        """Store a worker's status, received `at`, if it is enrolled; raises ValueRefusedError."""
        for error in self.record_statuses([ReceivedStatus(worker, status, at)]).values():
            raise error

    def record_statuses(self, statuses: Sequence[ReceivedStatus]) -> dict[str, RegistryError]:
        """Store statuses in one transaction; return why those of some names are not stored."""
        return self._transactions.write(lambda db: store_statuses(db, statuses))

    def mark_all_offline(self) -> None:
        """Mark devices and workers offline until they publish a status again.

        For the start of the collector, which has missed what was published before.
        """

        def work(db: Session) -> None:
            db.execute(update(StatusRecord).values(online=False))
            db.execute(update(WorkerRecord).values(online=False))

        self._transactions.write(work)

    def record_report(self, device: str, report: GenerationReport) -> bool:
        """Store one report; return False when it was stored before.

        Raises:
            UnknownDeviceError: the device is not enrolled.
            ReportError: it can never be stored: its sources do not add up to the tokens, for
                instance.
        """
        (outcome,) = self.record_reports({(device, report.generation): report}).values()
        if isinstance(outcome, RegistryError):
            raise outcome
        return outcome

    def record_reports(
        self, reports: dict[DeviceKey, GenerationReport]
    ) -> dict[DeviceKey, IngestOutcome]:
        """Store reports by device and generation in one transaction; return their outcomes."""
        return self._transactions.write(lambda db: store_reports(db, reports))

    def delete_old_generations(self, recorded_before: float, limit: int) -> int:
        """Delete at most `limit` generations that were recorded before then, the oldest first.

        Sessions that have none left are deleted, too. Roll-ups, and so the statistics of whole
        hours, stay. Return the number of deleted generations.
        """
        oldest = (
            select(GenerationRecord.id)
            .where(GenerationRecord.recorded_at < recorded_before)
            .order_by(GenerationRecord.recorded_at)
            .limit(limit)
        )

        return self._transactions.write(lambda db: _delete(db, db.scalars(oldest).all()))

    def workers(self) -> list[WorkerRow]:
        """Return every worker that has published a status, by name."""
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

    def devices(self, names: Sequence[str] | None = None) -> list[DeviceRow]:
        """Return every enrolled device, or those of some names, by name."""
        with self._transactions.reading() as db:
            return _device_rows(db, names)

    def device_page(
        self, wanted: DeviceFilter, after: str | None = None, limit: int = 100
    ) -> tuple[list[DeviceRow], DevicePage]:
        """Return a page of devices, which follow the device `after`, and its names and counts."""
        with self._transactions.reading() as db:
            page = page_of_devices(db, wanted, after, limit, time.time())
            rows = {row.device: row for row in _device_rows(db, page.names)}
            return [rows[name] for name in page.names], page

    def device(self, name: str) -> DeviceRow:
        """Return one device.

        Raises:
            UnknownDeviceError: it is not enrolled.
        """
        with self._transactions.reading() as db:
            check_device(db, name)
            (row,) = _device_rows(db, [name])
            return row

    def per_device(
        self,
        device: str | None = None,
        since: float | None = None,
        *,
        group: str | None = None,
        devices: Sequence[str] | None = None,
        now: float | None = None,
    ) -> list[StatsRow]:
        """Return the sums of each device's answers; only of those from `since` on.

        With `devices` only these have a row.

        Raises:
            UnknownDeviceError: `device` is not enrolled.
        """
        query = StatsQuery(
            now=now or time.time(),
            since=since,
            device=device,
            group=group,
            devices=None if devices is None else tuple(devices),
        )
        with self._transactions.reading() as db:
            return stats_per_device(db, query)

    def grouped(
        self,
        by: By,
        device: str | None = None,
        since: float | None = None,
        *,
        group: str | None = None,
        now: float | None = None,
    ) -> list[GroupStats] | list[BundleStats] | list[HourStats]:
        """Return the sums for each group, bundle or hour that has answers.

        Raises:
            UnknownDeviceError: `device` is not enrolled.
        """
        query = StatsQuery(now=now or time.time(), since=since, device=device, group=group)
        with self._transactions.reading() as db:
            return grouped_stats(db, by, query)

    def sessions(self, device: str | None = None, limit: int = 50) -> list[SessionRow]:
        """Return the latest `limit` sessions, newest first.

        Raises:
            UnknownDeviceError: `device` is not enrolled.
        """
        return list(self.numbered_sessions(device, limit).values())

    def numbered_sessions(
        self,
        device: str | None = None,
        limit: int = 50,
        *,
        before: tuple[float, int] | None = None,
    ) -> dict[int, SessionRow]:
        """Return sessions as `sessions`, by their numbers.

        Only those that are older than a session, which `before` gives by its time and its number.

        Raises:
            UnknownDeviceError: `device` is not enrolled.
        """
        row = GenerationRecord
        columns = (row.answers, row.tokens, row.bytes_up, row.bytes_down)
        query = (
            select(SessionRecord, *(_total(column) for column in columns))
            .join(row, row.session_id == SessionRecord.id)
            .group_by(SessionRecord.id)
            .order_by(SessionRecord.opened_at.desc(), SessionRecord.id.desc())
            .limit(limit)
        )
        if before is not None:
            query = query.where(tuple_(SessionRecord.opened_at, SessionRecord.id) < before)
        with self._transactions.reading() as db:
            if device is not None:
                check_device(db, device)
                query = query.where(SessionRecord.device == device)
            return {record.id: _session_row(record, *sums) for record, *sums in db.execute(query)}


def _delete(db: Session, generations: Sequence[int]) -> int:
    """Delete generations, and the sessions that have none left; return the number of the former."""
    is_old = GenerationRecord.id.in_(generations)
    session_ids = db.scalars(select(GenerationRecord.session_id).where(is_old).distinct())
    sessions = [id_ for id_ in session_ids if id_ is not None]
    db.execute(delete(TokenCount).where(TokenCount.generation_id.in_(generations)))
    db.execute(delete(GenerationRecord).where(is_old))
    is_used = exists().where(GenerationRecord.session_id == SessionRecord.id)
    db.execute(delete(SessionRecord).where(SessionRecord.id.in_(sessions), ~is_used))
    return len(generations)


def _session_row(
    record: SessionRecord, answers: int, tokens: int, bytes_up: int, bytes_down: int
) -> SessionRow:
    return SessionRow(
        session=record.session,
        device=record.device,
        worker=record.worker,
        opened_at=record.opened_at,
        generations=int(answers),
        tokens=int(tokens),
        bytes_up=int(bytes_up),
        bytes_down=int(bytes_down),
    )


def _device_rows(db: Session, names: Sequence[str] | None = None) -> list[DeviceRow]:
    query = (
        select(IdentityRecord, StatusRecord, is_online(), BundleRecord.name)
        .outerjoin(StatusRecord, StatusRecord.device == IdentityRecord.name)
        .outerjoin(BundleRecord, BundleRecord.bundle_id == StatusRecord.bundle_id)
        .where(is_device())
        .order_by(IdentityRecord.name)
    )
    if names is not None:
        query = query.where(IdentityRecord.name.in_(names))
    tags = tags_by_device(db, names)
    return [
        replace(
            _device_row(identity, status, tags.get(identity.name, {}), is_online=bool(online)),
            bundle_name=bundle_name,
        )
        for identity, status, online, bundle_name in db.execute(query)
    ]


def _device_row(
    identity: IdentityRecord, status: StatusRecord | None, tags: dict[str, str], *, is_online: bool
) -> DeviceRow:
    return DeviceRow(
        device=identity.name,
        group=identity.group,
        online=is_online,
        mode=status.mode if status else "",
        bundle_id=status.bundle_id if status else "",
        version=status.version if status else "",
        last_seen=status.last_seen if status else None,
        not_after=identity.not_after,
        config_version=status.config_version if status else 0,
        config_error=status.config_problem if status else None,
        software_error=status.software_problem if status else None,
        event_error=status.event_problem if status else None,
        state=state_at(identity.state, identity.not_after, time.time()),
        tags=tags,
    )


def _total(column: SQLColumnExpression[int]) -> SQLColumnExpression[int]:
    return func.coalesce(func.sum(column), 0)
