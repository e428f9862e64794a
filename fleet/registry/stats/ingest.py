"""Ingestion of statuses and reports into the registry's tables."""

from __future__ import annotations

from typing import Any, TypeAlias

import msgspec
from sqlalchemy import case, exists, func, select, tuple_
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DataError, IntegrityError
from sqlalchemy.orm import Session

from fleet.errors import RegistryError, ReportError
from fleet.protocol.access import Role
from fleet.protocol.report import DeviceStatus, GenerationReport, WorkerStatus
from fleet.registry.identities.devices import check_device, is_device, unknown_device
from fleet.registry.models import (
    GenerationRecord,
    IdentityRecord,
    SessionRecord,
    StatusRecord,
    Table,
    TokenCount,
    WorkerRecord,
)
from fleet.registry.stats.rollups import add_to_rollups

DeviceKey: TypeAlias = tuple[str, str]
"""A device and a name that is unique to it: of a generation, or of a session."""

IngestOutcome: TypeAlias = bool | RegistryError
"""The outcome of a report: True when it is stored now, False when it was before, or an error."""


def store_status(db: Session, device: str, status: DeviceStatus, at: float) -> None:
    """Store a device's status, received `at`; of a last will, only that the device is offline.

    Raises:
        UnknownDeviceError: it is not enrolled.
    """
    check_device(db, device)
    stored = db.get(StatusRecord, device)
    if status.online or stored is None:
        db.merge(StatusRecord(device=device, last_seen=at, **msgspec.to_builtins(status)))
    elif stored.online:
        stored.online = False
        stored.last_seen = at


def store_worker(db: Session, worker: str, status: WorkerStatus, at: float) -> None:
    """Store a worker's status, received `at`, if it is enrolled.

    Of a last will, only that the worker is offline.
    """
    if not status.online:
        stored = db.get(WorkerRecord, worker)
        if stored and stored.online:
            stored.online = False
            stored.last_seen = at
        return
    is_worker = (IdentityRecord.name == worker, IdentityRecord.role == Role.WORKER)
    if db.scalar(select(exists().where(*is_worker))):
        fields = msgspec.to_builtins(status) | {"bundle_ids": list(status.bundle_ids)}
        db.merge(WorkerRecord(worker=worker, last_seen=at, **fields))


def store_reports(
    db: Session, reports: dict[DeviceKey, GenerationReport]
) -> dict[DeviceKey, IngestOutcome]:
    """Store reports by device and generation, in a few statements for all.

    A bad report harms no other: its outcome is an UnknownDeviceError, or a ReportError when it can
    never be stored.
    """
    outcomes: dict[DeviceKey, IngestOutcome] = {}
    for key, report in reports.items():
        if wrong_sum := _sum_error(report):
            outcomes[key] = wrong_sum
    devices = {device for device, _ in reports}
    enrolled = db.scalars(
        select(IdentityRecord.name).where(is_device(), IdentityRecord.name.in_(devices))
    )
    for device in devices.difference(enrolled):
        error = unknown_device(db, device)
        outcomes |= {key: error for key in reports if key[0] == device}
    valid = {key: report for key, report in reports.items() if key not in outcomes}
    return outcomes | _store_valid(db, valid)


def _sum_error(report: GenerationReport) -> ReportError | None:
    total = sum(report.sources.values())
    if total == report.tokens:
        return None
    counted = f"generation {report.generation} counts {report.tokens} tokens"
    return ReportError(f"{counted}, but its sources add up to {total}")


def _store_valid(
    db: Session, reports: dict[DeviceKey, GenerationReport]
) -> dict[DeviceKey, IngestOutcome]:
    """Store the reports; where the database refuses a value, store each half apart, and so on."""
    try:
        with db.begin_nested():
            return _insert(db, reports)
    except (DataError, IntegrityError) as error:
        if len(reports) == 1:
            reason = " ".join(str(error.orig).split())
            return {
                key: ReportError(f"the registry refuses generation {key[1]}: {reason}")
                for key in reports
            }
    items = list(reports.items())
    middle = len(items) // 2
    return _store_valid(db, dict(items[:middle])) | _store_valid(db, dict(items[middle:]))


def _insert(
    db: Session, reports: dict[DeviceKey, GenerationReport]
) -> dict[DeviceKey, IngestOutcome]:
    row = GenerationRecord
    query = select(row.device, row.generation)
    same = query.where(tuple_(row.device, row.generation).in_(list(reports)))
    stored = {(device, generation) for device, generation in db.execute(same)}
    new = {key: report for key, report in reports.items() if key not in stored}
    if not new:
        return dict.fromkeys(reports, False)
    sessions = _sessions(db, new)
    insert = _insert_into(db, row).on_conflict_do_nothing()
    inserted = db.execute(
        insert.returning(row.device, row.generation, row.id),
        [_row(device, report, sessions) for (device, _), report in new.items()],
    )
    ids = {(device, generation): id_ for device, generation, id_ in inserted}
    counts = [
        {"generation_id": id_, "source": source, "tokens": tokens}
        for key, id_ in ids.items()
        for source, tokens in reports[key].sources.items()
    ]
    if counts:
        db.execute(_insert_into(db, TokenCount), counts)
    add_to_rollups(db, [(key[0], reports[key]) for key in ids])
    return {key: key in ids for key in reports}


def _sessions(db: Session, reports: dict[DeviceKey, GenerationReport]) -> dict[DeviceKey, int]:
    """Insert or update the reports' sessions; return their ids.

    A session begins with its first answer, and its worker is that of its last one.
    """
    rows: dict[DeviceKey, dict[str, Any]] = {}
    for (device, _), report in sorted(reports.items(), key=lambda item: item[1].started_at):
        if report.session is not None:
            new = {
                "device": device,
                "session": report.session,
                "worker": None,
                "opened_at": report.started_at,
            }
            row = rows.setdefault((device, report.session), new)
            row["worker"] = report.worker or row["worker"]
    if not rows:
        return {}
    record = SessionRecord
    ordered = [rows[key] for key in sorted(rows)]  # one order in all processes: no deadlock
    inserted = db.execute(
        _upsert_sessions(db).returning(record.device, record.session, record.id), ordered
    )
    return {(device, session): id_ for device, session, id_ in inserted}


def _upsert_sessions(db: Session) -> postgresql.Insert | sqlite.Insert:
    stored = SessionRecord
    insert = _insert_into(db, SessionRecord)
    new = insert.excluded
    earlier = case((new.opened_at < stored.opened_at, new.opened_at), else_=stored.opened_at)
    return insert.on_conflict_do_update(
        index_elements=[stored.device, stored.session],
        set_={"worker": func.coalesce(new.worker, stored.worker), "opened_at": earlier},
    )


def _row(device: str, report: GenerationReport, sessions: dict[DeviceKey, int]) -> dict[str, Any]:
    session_id = sessions[device, report.session] if report.session is not None else None
    fields = msgspec.to_builtins(report) | {"device": device, "session_id": session_id}
    return {
        column.name: fields[column.name]
        for column in GenerationRecord.__table__.columns
        if column.name in fields
    }


def _insert_into(db: Session, table: type[Table]) -> postgresql.Insert | sqlite.Insert:
    """Return an INSERT that supports ON CONFLICT, which differs by dialect."""
    into = table.metadata.tables[table.__tablename__]
    if db.get_bind().dialect.name == "postgresql":
        return postgresql.insert(into)
    return sqlite.insert(into)
