"""Ingestion of statuses and reports into the registry's tables."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeAlias, TypeVar

import msgspec
from sqlalchemy import Table as SqlTable
from sqlalchemy import case, func, select, tuple_
from sqlalchemy.exc import DataError, IntegrityError
from sqlalchemy.orm import Session

from fleet.errors import RegistryError, ReportError, ValueRefusedError
from fleet.protocol.access import Role
from fleet.protocol.report import DeviceStatus, GenerationReport, WorkerStatus
from fleet.registry.identities.devices import is_device, unknown_device
from fleet.registry.models import (
    BundleRecord,
    GenerationRecord,
    IdentityRecord,
    SessionRecord,
    StatusRecord,
    Table,
    TokenCount,
    WorkerRecord,
)
from fleet.registry.stats.bulk_insert import BulkInsert, execute_rows, insert_into
from fleet.registry.stats.rollup_columns import SPANS_S
from fleet.registry.stats.rollup_tables import ROLLUPS
from fleet.registry.stats.rollups import add_to_rollups

T = TypeVar("T")

MAX_OTHER_BUNDLES: Final = 4
"""The bundles of a device that were not added to the fleet, such as one under development."""

DeviceKey: TypeAlias = tuple[str, str]
"""A device and a name that is unique to it: of a generation, or of a session."""

IngestOutcome: TypeAlias = bool | RegistryError
"""The outcome of a report: True when it is stored now, False when it was before, or an error."""


class ReceivedStatus(NamedTuple):
    """A status of a device or a worker, received `at`."""

    name: str
    status: DeviceStatus | WorkerStatus
    at: float


def store_statuses(db: Session, statuses: Sequence[ReceivedStatus]) -> dict[str, RegistryError]:
    """Store statuses in a few statements for all; return why those of some names are not stored.

    The status of a worker that is not enrolled is left out. Of a last will only the fact is stored
    that the device or worker is offline.
    """
    names = {received.name for received in statuses}
    is_known = IdentityRecord.name.in_(names)
    is_worker = IdentityRecord.role == Role.WORKER
    devices = set(db.scalars(select(IdentityRecord.name).where(is_device(), is_known)))
    workers = set(db.scalars(select(IdentityRecord.name).where(is_worker, is_known)))
    of_devices = [each for each in statuses if isinstance(each.status, DeviceStatus)]
    valid = [each for each in of_devices if each.name in devices]
    valid += [
        each for each in statuses if isinstance(each.status, WorkerStatus) and each.name in workers
    ]
    valid.sort(key=lambda each: each.name)  # one order in all processes: no deadlock
    refused = _store_in_halves(db, valid, lambda some: _upsert_statuses(db, some))
    unknown = {each.name for each in of_devices}.difference(devices)
    return {name: unknown_device(db, name) for name in unknown} | {
        each.name: ValueRefusedError(f"the registry does not accept a value: {reason}")
        for each, reason in refused
    }


def _upsert_statuses(db: Session, statuses: Sequence[ReceivedStatus]) -> None:
    """Store statuses of enrolled devices and workers; a birth comes before its last will."""
    for table, kind in ((StatusRecord, DeviceStatus), (WorkerRecord, WorkerStatus)):
        own = [each for each in statuses if isinstance(each.status, kind)]
        births = [_status_row(table, each) for each in own if each.status.online]
        if births:
            execute_rows(db, _upsert_births(db, table), _table(table), births)
        wills = [_status_row(table, each) for each in own if not each.status.online]
        if wills:
            execute_rows(db, _upsert_wills(db, table), _table(table), wills)


def _status_row(table: type[Table], received: ReceivedStatus) -> dict[str, Any]:
    fields = msgspec.to_builtins(received.status) | {"last_seen": received.at}
    return {column.name: fields.get(column.name, received.name) for column in _table(table).columns}


def _upsert_births(db: Session, table: type[Table]) -> BulkInsert:
    insert = insert_into(db, _table(table))
    columns = [column for column in _table(table).columns if not column.primary_key]
    return insert.on_conflict_do_update(
        index_elements=list(_table(table).primary_key.columns),
        set_={column.name: insert.excluded[column.name] for column in columns},
    )


def _upsert_wills(db: Session, table: type[Table]) -> BulkInsert:
    insert = insert_into(db, _table(table))
    stored = _table(table).columns
    last_seen = case((stored.online, insert.excluded.last_seen), else_=stored.last_seen)
    return insert.on_conflict_do_update(
        index_elements=list(_table(table).primary_key.columns),
        set_={"online": False, "last_seen": last_seen},
    )


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
    outcomes |= _bundle_errors(db, reports)
    valid = [item for item in reports.items() if item[0] not in outcomes]
    refused = _store_in_halves(db, valid, lambda some: outcomes.update(_insert(db, dict(some))))
    for (key, _), reason in refused:
        outcomes[key] = ReportError(f"the registry refuses generation {key[1]}: {reason}")
    return outcomes


def _sum_error(report: GenerationReport) -> ReportError | None:
    total = sum(report.sources.values())
    if total == report.tokens:
        return None
    counted = f"generation {report.generation} counts {report.tokens} tokens"
    return ReportError(f"{counted}, but its sources add up to {total}")


def _bundle_errors(
    db: Session, reports: Mapping[DeviceKey, GenerationReport]
) -> dict[DeviceKey, IngestOutcome]:
    """Refuse the reports on bundles that the fleet does not have, beyond a few for each device."""
    bundle_ids = {report.bundle_id for report in reports.values()}
    added = select(BundleRecord.bundle_id)
    known = set(db.scalars(added.where(BundleRecord.bundle_id.in_(bundle_ids))))
    others = {key: each for key, each in reports.items() if each.bundle_id not in known}
    if not others:
        return {}
    column = ROLLUPS.c
    own: dict[str, set[str]] = defaultdict(set)
    seen = select(column.device, column.bundle_id).where(
        column.span_s == SPANS_S[-1],
        column.device.in_({device for device, _ in others}),
        column.bundle_id.not_in(added),
    )
    for device, bundle_id in db.execute(seen):
        own[device].add(bundle_id)
    errors: dict[DeviceKey, IngestOutcome] = {}
    for key, report in others.items():
        bundles = own[key[0]]
        if report.bundle_id in bundles or len(bundles) < MAX_OTHER_BUNDLES:
            bundles.add(report.bundle_id)
        else:
            reason = f"is of bundle {report.bundle_id}, which the fleet does not have"
            errors[key] = ReportError(f"generation {key[1]} {reason}; add it with 'fleet bundle'")
    return errors


def _store_in_halves(
    db: Session, items: Sequence[T], store: Callable[[Sequence[T]], object]
) -> list[tuple[T, str]]:
    """Store items together; where the database refuses a value, each half apart, and so on.

    Return the refused items, each with the database's reason.
    """
    if not items:
        return []
    try:
        with db.begin_nested():
            store(items)
        return []
    except (DataError, IntegrityError) as error:
        if len(items) == 1:
            return [(items[0], " ".join(str(error.orig).split()))]
    middle = len(items) // 2
    refused = _store_in_halves(db, items[:middle], store)
    return refused + _store_in_halves(db, items[middle:], store)


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
    insert = insert_into(db, _table(row)).on_conflict_do_nothing()
    rows = [_row(device, report, sessions) for (device, _), report in new.items()]
    columns = _table(row).c
    returning = [columns.device, columns.generation, columns.id]
    inserted = execute_rows(db, insert, _table(row), rows, returning)
    ids = {(device, generation): id_ for device, generation, id_ in inserted}
    counts = [
        {"generation_id": id_, "source": source, "tokens": tokens}
        for key, id_ in ids.items()
        for source, tokens in reports[key].sources.items()
    ]
    if counts:
        table = _table(TokenCount)
        execute_rows(db, insert_into(db, table), table, counts)
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
    ordered = [rows[key] for key in sorted(rows)]  # one order in all processes: no deadlock
    columns = _table(SessionRecord).c
    returning = [columns.device, columns.session, columns.id]
    upsert = _upsert_sessions(db)
    inserted = execute_rows(db, upsert, _table(SessionRecord), ordered, returning)
    return {(device, session): id_ for device, session, id_ in inserted}


def _upsert_sessions(db: Session) -> BulkInsert:
    stored = SessionRecord
    insert = insert_into(db, _table(SessionRecord))
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
        for column in _table(GenerationRecord).columns
        if column.name in fields
    }


def _table(record: type[Table]) -> SqlTable:
    return record.metadata.tables[record.__tablename__]
