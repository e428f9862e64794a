"""The registry: the one place that knows who was enrolled and what was counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from sqlalchemy import Engine, SQLColumnExpression, and_, func, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, sessionmaker

from fleet.access import Grants, Role
from fleet.policy import NO_EXITS, offload_rate
from fleet.registry.database import open_database, registry_errors, writing
from fleet.registry.devices import check_device, is_device
from fleet.registry.enrolment import add_identity
from fleet.registry.models import (
    AllowedTarget,
    GenerationRecord,
    IdentityRecord,
    SessionRecord,
    StatusRecord,
    TokenCount,
)
from fleet.registry.reports import store_report, store_status
from fleet.registry.rows import DeviceRow, IdentityRow, SessionRow, StatsRow
from fleet.report import DeviceStatus, GenerationReport

T = TypeVar("T")


class Registry:
    """One database. Every method is one transaction; any thread, and several processes, may call at once."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._readers = sessionmaker(engine)
        self._writers = sessionmaker(writing(engine))

    @classmethod
    def open(cls, url_or_path: str | Path) -> Registry:
        """Opens a SQLite file, or a database by its SQLAlchemy URL; makes or migrates its tables.

        Raises:
            RegistryError: it cannot be opened.
            MissingExtraError: its driver is not installed.
        """
        return cls(open_database(url_or_path))

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
        self._write(
            lambda db: add_identity(
                db, name, role, group, wanted, fingerprint=fingerprint, not_after=not_after, replace=replace
            )
        )

    def identities(self, role: Role | None = None) -> list[IdentityRow]:
        """Everyone that was enrolled, by name; only those of `role` when it is given."""
        query = select(IdentityRecord).order_by(IdentityRecord.name)
        with self._reading() as db:
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
        with self._reading() as db:
            record = db.get(IdentityRecord, name)
            if record is None or record.revoked:
                return None
            allowed = select(AllowedTarget.target).where(AllowedTarget.app == name)
            devices = (
                select(IdentityRecord.name)
                .where(is_device(), or_(IdentityRecord.name.in_(allowed), IdentityRecord.group.in_(allowed)))
                .order_by(IdentityRecord.name)
            )
            return Grants(Role(record.role), name, tuple(db.scalars(devices)))

    def record_status(self, device: str, status: DeviceStatus, at: float) -> None:
        """Keeps what a device says of itself, heard at `at`. A last will says no more than that it is gone.

        Raises:
            UnknownDeviceError: nobody enrolled it.
        """
        self._write(lambda db: store_status(db, device, status, at))

    def all_offline(self) -> None:
        """Counts every device as offline until it is heard again: for the start, when nobody has listened."""
        self._write(lambda db: db.execute(update(StatusRecord).values(online=False)))

    def record_report(self, device: str, report: GenerationReport) -> bool:
        """Stores one answer's counts; False when this report has come before.

        Raises:
            UnknownDeviceError: nobody enrolled the device.
            RegistryError: the sources do not add up to the tokens.
        """
        return self._write(lambda db: store_report(db, device, report))

    def devices(self) -> list[DeviceRow]:
        """Every enrolled device, by name."""
        query = (
            select(IdentityRecord, StatusRecord)
            .outerjoin(StatusRecord, StatusRecord.device == IdentityRecord.name)
            .where(is_device())
            .order_by(IdentityRecord.name)
        )
        with self._reading() as db:
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

    def stats(self, device: str | None = None, since: float | None = None) -> list[StatsRow]:
        """The sums of generations, a row for each device; only those that started at `since` or later.

        Raises:
            UnknownDeviceError: nobody enrolled `device`.
        """
        counted = GenerationRecord.started_at >= since if since is not None else GenerationRecord.id.is_not(None)
        sums = (
            select(
                IdentityRecord.name,
                func.count(GenerationRecord.id),
                _total(GenerationRecord.tokens),
                _total(GenerationRecord.bytes_up),
                _total(GenerationRecord.bytes_down),
            )
            .outerjoin(GenerationRecord, and_(GenerationRecord.device == IdentityRecord.name, counted))
            .where(is_device(device))
            .group_by(IdentityRecord.name)
            .order_by(IdentityRecord.name)
        )
        by_source = (
            select(GenerationRecord.device, TokenCount.source, _total(TokenCount.tokens))
            .join(TokenCount, TokenCount.generation_id == GenerationRecord.id)
            .where(counted)
            .group_by(GenerationRecord.device, TokenCount.source)
        )
        if device is not None:
            by_source = by_source.where(GenerationRecord.device == device)
        with self._reading() as db:
            if device is not None:
                check_device(db, device)
            rows = db.execute(sums).all()
            sources: dict[str, dict[str, int]] = {}
            for name, source, tokens in sorted(db.execute(by_source), key=lambda row: _depth(row[1])):
                sources.setdefault(name, {})[source] = int(tokens)
        return [
            StatsRow(
                name,
                generations,
                int(tokens),
                sources.get(name, {}),
                round(offload_rate(sources.get(name, {})), 6),
                int(bytes_up),
                int(bytes_down),
            )
            for name, generations, tokens, bytes_up, bytes_down in rows
        ]

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
                func.count(GenerationRecord.id),
                _total(GenerationRecord.tokens),
                _total(GenerationRecord.bytes_up),
                _total(GenerationRecord.bytes_down),
            )
            .join(GenerationRecord, GenerationRecord.session_id == SessionRecord.id)
            .group_by(SessionRecord.id)
            .order_by(SessionRecord.opened_at.desc(), SessionRecord.id.desc())
            .limit(limit)
        )
        with self._reading() as db:
            if device is not None:
                check_device(db, device)
                query = query.where(SessionRecord.device == device)
            return [
                SessionRow(
                    *row[:4], generations=row[4], tokens=int(row[5]), bytes_up=int(row[6]), bytes_down=int(row[7])
                )
                for row in db.execute(query)
            ]

    @contextmanager
    def _reading(self) -> Iterator[Session]:
        with registry_errors(self._engine.url), self._readers() as db:
            yield db

    def _write(self, work: Callable[[Session], T]) -> T:
        """Runs `work` in a transaction, once more if another process has written the same row in the meantime."""
        with registry_errors(self._engine.url):
            try:
                with self._writers.begin() as db:
                    return work(db)
            except IntegrityError:
                with self._writers.begin() as db:
                    return work(db)


def _total(column: SQLColumnExpression[int]) -> SQLColumnExpression[int]:
    return func.coalesce(func.sum(column), 0)


def _depth(source: str) -> tuple[int, int]:
    """Order of a source: exits by their layer, then what is no exit."""
    if source in NO_EXITS:
        return 1 + NO_EXITS.index(source), 0
    return 0, int(source.removeprefix("exit:"))
