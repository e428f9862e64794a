"""The registry: the one place that knows who was enrolled and what was counted."""

from __future__ import annotations

import getpass
import socket
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

from sqlalchemy import Engine, SQLColumnExpression, func, or_, select, update
from sqlalchemy.orm import Session

from fleet.access import Grants, Role
from fleet.denial import MAX_DENIED
from fleet.desired import DesiredConfig, Settings
from fleet.registry.audit import audit, audit_log, newest_change
from fleet.registry.configs import Target, change_settings, current_settings, desired_configs
from fleet.registry.counting import By, Question
from fleet.registry.database import open_database
from fleet.registry.devices import check_device, is_device
from fleet.registry.enrolment import add_identity
from fleet.registry.everybody import all_grants
from fleet.registry.models import (
    AllowedTarget,
    GenerationRecord,
    IdentityRecord,
    SessionRecord,
    StatusRecord,
)
from fleet.registry.reports import Fate, Key, store_report, store_reports, store_status
from fleet.registry.retention import forget
from fleet.registry.revocation import denied, knows_certificate, revoked_certificates
from fleet.registry.rows import (
    AuditRow,
    BundleStats,
    DeviceRow,
    GroupStats,
    HourStats,
    IdentityRow,
    RevokedCertificate,
    SessionRow,
    StatsRow,
)
from fleet.registry.states import State, state_at
from fleet.registry.statistics import device_stats, grouped_stats
from fleet.registry.transactions import Transactions
from fleet.report import DeviceStatus, GenerationReport


class Registry:
    """One database. Every method is one transaction; any thread, and several processes, may call at once.

    `actor` is who makes the changes that go into the audit log.
    """

    def __init__(self, engine: Engine, actor: str) -> None:
        self.actor = actor
        self._engine = engine
        self._transactions = Transactions(engine)

    @classmethod
    def open(cls, url_or_path: str | Path, actor: str | None = None) -> Registry:
        """Opens a SQLite file, or a database by its SQLAlchemy URL; makes or migrates its tables.

        Raises:
            RegistryError: it cannot be opened.
            MissingExtraError: its driver is not installed.
        """
        return cls(open_database(url_or_path), actor or f"{getpass.getuser()}@{socket.gethostname()}")

    def close(self) -> None:
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def add_identity(
        self,
        name: str,
        role: Role,
        group: str | None = None,
        targets: Iterable[str] = (),
        *,
        fingerprint: str,
        not_after: float,
        replace: bool = False,
    ) -> None:
        """Enrols `name`. `targets` are devices, or groups of them, that an app may send prompts to.

        Raises:
            IdentityError: the name is taken (unless `replace`), is a group's, or the group's is a device's;
                a target is neither a device nor a group.
        """
        wanted = tuple(targets)

        def work(db: Session) -> None:
            add_identity(db, name, role, group, wanted, fingerprint=fingerprint, not_after=not_after, replace=replace)
            audit(db, self.actor, "enroll", name, role=role, group=group, allow=list(wanted))

        self._transactions.write(work)

    def identities(self, role: Role | None = None) -> list[IdentityRow]:
        """Everyone that was enrolled, by name; only those of `role` when it is given."""
        query = select(IdentityRecord).order_by(IdentityRecord.name)
        with self._transactions.reading() as db:
            records = db.scalars(query.where(IdentityRecord.role == role) if role else query).all()
            allowed = db.execute(select(AllowedTarget.app, AllowedTarget.target).order_by(AllowedTarget.target)).all()
        return [
            IdentityRow(
                record.name,
                record.role,
                record.group,
                tuple(target for app, target in allowed if app == record.name),
                record.fingerprint,
                record.created_at,
                record.not_after,
            )
            for record in records
        ]

    def grants(self, name: str) -> Grants | None:
        """What `name` may do, an app's groups resolved to today's devices; None for who is unknown or revoked."""
        with self._transactions.reading() as db:
            record = db.get(IdentityRecord, name)
            if record is None or state_at(record.state, record.not_after, time.time()) is not State.ACTIVE:
                return None
            allowed = select(AllowedTarget.target).where(AllowedTarget.app == name)
            devices = (
                select(IdentityRecord.name)
                .where(is_device(), or_(IdentityRecord.name.in_(allowed), IdentityRecord.group.in_(allowed)))
                .order_by(IdentityRecord.name)
            )
            return Grants(Role(record.role), name, tuple(db.scalars(devices)))

    def all_grants(self) -> list[Grants]:
        """What everybody who is active may do, by name."""
        with self._transactions.reading() as db:
            return all_grants(db, time.time())

    def knows_certificate(self, name: str, fingerprint: str) -> bool:
        """Whether the certificate of `name` with this SHA-256 (of its DER, in hex) counts: handed out, not revoked."""
        with self._transactions.reading() as db:
            return knows_certificate(db, name, fingerprint)

    def admitted(self, name: str, fingerprint: str) -> Grants | None:
        """What the holder of a certificate may do; None when it does not count, or `name` is not active."""
        return self.grants(name) if self.knows_certificate(name, fingerprint) else None

    def revoked_certificates(self, now: float | None = None) -> list[RevokedCertificate]:
        """What belongs on a revocation list: revoked or on hold, and not ended yet, by serial."""
        with self._transactions.reading() as db:
            return revoked_certificates(db, time.time() if now is None else now)

    def denied(self, now: float | None = None, limit: int = MAX_DENIED) -> list[str]:
        """The devices that are suspended, revoked or expired; at most `limit`, the latest certificates first."""
        with self._transactions.reading() as db:
            return denied(db, time.time() if now is None else now, limit)

    def record_status(self, device: str, status: DeviceStatus, at: float) -> None:
        """Keeps what a device says of itself, heard at `at`. A last will says no more than that it is gone.

        Raises:
            UnknownDeviceError: nobody enrolled it.
        """
        self._transactions.write(lambda db: store_status(db, device, status, at))

    def settings(self, target: Target) -> Settings:
        """What was said last for one target alone."""
        with self._transactions.reading() as db:
            return current_settings(db, target)

    def change_settings(self, target: Target, change: Callable[[Settings], Settings]) -> int:
        """Puts ``change(settings)`` in the place of a target's settings; the new version.

        Raises:
            UnknownDeviceError: nobody enrolled the device.
            ConfigError: no device is in the group.
        """
        return self._transactions.write(
            lambda db: change_settings(db, self.actor, target, change(current_settings(db, target)))
        )

    def desired_configs(self, devices: Iterable[str] | None = None) -> dict[str, DesiredConfig]:
        """What is wanted of each device, or of those named; version 0 where nothing was ever said."""
        with self._transactions.reading() as db:
            return desired_configs(db, devices)

    def newest_change(self) -> int:
        """A number that grows with every change in the audit log."""
        with self._transactions.reading() as db:
            return newest_change(db)

    def audit_log(self, subject: str | None = None, since: float | None = None, limit: int = 100) -> list[AuditRow]:
        """The latest changes, newest first: of one subject, and at `since` or later, where they are given."""
        with self._transactions.reading() as db:
            return audit_log(db, subject, since, limit)

    def all_offline(self) -> None:
        """Counts every device as offline until it is heard again: for the start, when nobody has listened."""
        self._transactions.write(lambda db: db.execute(update(StatusRecord).values(online=False)))

    def record_report(self, device: str, report: GenerationReport) -> bool:
        """Stores one answer's counts; False when this report has come before.

        Raises:
            UnknownDeviceError: nobody enrolled the device.
            ReportError: it can never be stored; its sources do not add up to the tokens, for instance.
        """
        return self._transactions.write(lambda db: store_report(db, device, report))

    def record_reports(self, reports: dict[Key, GenerationReport]) -> dict[Key, Fate]:
        """Stores reports by device and generation in one transaction; what became of each."""
        return self._transactions.write(lambda db: store_reports(db, reports))

    def devices(self) -> list[DeviceRow]:
        """Every enrolled device, by name."""
        query = (
            select(IdentityRecord, StatusRecord)
            .outerjoin(StatusRecord, StatusRecord.device == IdentityRecord.name)
            .where(is_device())
            .order_by(IdentityRecord.name)
        )
        with self._transactions.reading() as db:
            return [
                DeviceRow(
                    identity.name,
                    identity.group,
                    online=bool(status and status.online),
                    mode=status.mode if status else "",
                    bundle_id=status.bundle_id if status else "",
                    version=status.version if status else "",
                    last_seen=status.last_seen if status else None,
                    not_after=identity.not_after,
                )
                for identity, status in db.execute(query)
            ]

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
            return device_stats(db, Question(now or time.time(), since, device, group))

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
            return grouped_stats(db, by, Question(now or time.time(), since, device, group))

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
                    *row[:4], generations=int(row[4]), tokens=int(row[5]), bytes_up=int(row[6]), bytes_down=int(row[7])
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
