"""What devices say of themselves and of their answers, and how it is written."""

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

Key: TypeAlias = tuple[str, str]
"""A device and a name that is unique to it: of a generation, or of a session."""

IngestOutcome: TypeAlias = bool | RegistryError
"""What has become of a report: stored now, stored before, or why not."""


def store_status(db: Session, device: str, status: DeviceStatus, at: float) -> None:
    """Raises UnknownDeviceError. A last will says no more than that the device is gone."""
    check_device(db, device)
    known = db.get(StatusRecord, device)
    if status.online or known is None:
        db.merge(
            StatusRecord(
                device=device,
                online=status.online,
                epoch=status.epoch,
                bundle_id=status.bundle_id,
                version=status.version,
                mode=status.mode,
                last_seen=at,
                config_version=status.config_version,
                config_error=status.config_error,
            )
        )
    elif known.online:
        known.online = False
        known.last_seen = at


def store_worker(db: Session, worker: str, status: WorkerStatus, at: float) -> None:
    """Of one that was not enrolled nothing is kept. A last will says no more than that the worker is gone."""
    known = db.get(WorkerRecord, worker)
    if not status.online:
        if known and known.online:
            known.online = False
            known.last_seen = at
    elif db.scalar(
        select(exists().where(IdentityRecord.name == worker, IdentityRecord.role == Role.WORKER))
    ):
        said = msgspec.to_builtins(status) | {"bundle_ids": list(status.bundle_ids)}
        db.merge(WorkerRecord(worker=worker, last_seen=at, **said))


def store_report(db: Session, device: str, report: GenerationReport) -> bool:
    """False when it is stored already; raises UnknownDeviceError, and ReportError when it can never be stored."""
    (fate,) = store_reports(db, {(device, report.generation): report}).values()
    if isinstance(fate, RegistryError):
        raise fate
    return fate


def store_reports(db: Session, reports: dict[Key, GenerationReport]) -> dict[Key, IngestOutcome]:
    """Stores reports by device and generation, in a few statements for all; a bad one harms no other.

    What became of each: True when it is stored now, False when it was before, else an UnknownDeviceError, or a
    ReportError when it can never be stored.
    """
    fates: dict[Key, IngestOutcome] = {}
    for key, report in reports.items():
        if (counted := sum(report.sources.values())) != report.tokens:
            fates[key] = ReportError(
                f"generation {report.generation} counts {report.tokens} tokens, but its sources add up to {counted}"
            )
    devices = {device for device, _ in reports}
    enrolled = db.scalars(
        select(IdentityRecord.name).where(is_device(), IdentityRecord.name.in_(devices))
    )
    for device in devices.difference(enrolled):
        fates |= {key: unknown_device(db, device) for key in reports if key[0] == device}
    return fates | _store_sound(
        db, {key: report for key, report in reports.items() if key not in fates}
    )


def _store_sound(db: Session, reports: dict[Key, GenerationReport]) -> dict[Key, IngestOutcome]:
    """Where the database refuses a value, the half that has it is stored apart, and so on."""
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
    return _store_sound(db, dict(items[:middle])) | _store_sound(db, dict(items[middle:]))


def _insert(db: Session, reports: dict[Key, GenerationReport]) -> dict[Key, IngestOutcome]:
    row = GenerationRecord
    same = tuple_(row.device, row.generation).in_(list(reports))
    known = {
        (device, generation)
        for device, generation in db.execute(select(row.device, row.generation).where(same))
    }
    new = {key: report for key, report in reports.items() if key not in known}
    if not new:
        return dict.fromkeys(reports, False)
    sessions = _sessions(db, new)
    insert = (
        _insert_into(db, row).on_conflict_do_nothing().returning(row.device, row.generation, row.id)
    )
    rows = [_row(device, report, sessions) for (device, _), report in new.items()]
    ids = {(device, generation): id_ for device, generation, id_ in db.execute(insert, rows)}
    counts = [
        {"generation_id": id_, "source": source, "tokens": tokens}
        for key, id_ in ids.items()
        for source, tokens in reports[key].sources.items()
    ]
    if counts:
        db.execute(_insert_into(db, TokenCount), counts)
    add_to_rollups(db, [(device, reports[device, generation]) for device, generation in ids])
    return {key: key in ids for key in reports}


def _sessions(db: Session, reports: dict[Key, GenerationReport]) -> dict[Key, int]:
    """The ids of the reports' sessions, which begin with their first answer and are with their last worker."""
    rows: dict[Key, dict[str, Any]] = {}
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
    ours = SessionRecord
    insert = _insert_into(db, SessionRecord)
    theirs = insert.excluded
    upsert = insert.on_conflict_do_update(
        index_elements=[ours.device, ours.session],
        set_={
            "worker": func.coalesce(theirs.worker, ours.worker),
            "opened_at": case(
                (theirs.opened_at < ours.opened_at, theirs.opened_at), else_=ours.opened_at
            ),
        },
    ).returning(ours.device, ours.session, ours.id)
    ordered = [
        rows[key] for key in sorted(rows)
    ]  # two processes that write at once do not wait for each other
    return {(device, session): id_ for device, session, id_ in db.execute(upsert, ordered)}


def _row(device: str, report: GenerationReport, sessions: dict[Key, int]) -> dict[str, Any]:
    session_id = sessions[device, report.session] if report.session is not None else None
    fields = msgspec.to_builtins(report) | {"device": device, "session_id": session_id}
    return {
        column.name: fields[column.name]
        for column in GenerationRecord.__table__.columns
        if column.name in fields
    }


def _insert_into(db: Session, table: type[Table]) -> postgresql.Insert | sqlite.Insert:
    """An INSERT that knows ON CONFLICT, which every dialect spells for itself."""
    into = table.metadata.tables[table.__tablename__]
    return (
        postgresql.insert(into)
        if db.get_bind().dialect.name == "postgresql"
        else sqlite.insert(into)
    )
