"""The registry: the one place that knows who was enrolled and what was counted."""

from __future__ import annotations

import getpass
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from sqlalchemy import Engine, SQLColumnExpression, func, select, update
from sqlalchemy.orm import Session

from fleet.access import Grants, Role
from fleet.denial import MAX_DENIED
from fleet.desired import DesiredConfig, Settings
from fleet.enrolment import Enrolment
from fleet.errors import StateError, TokenError
from fleet.registry.allowed import all_tags, allow, change_tags, disallow, targets_of
from fleet.registry.audit import audit, audit_log, newest_change
from fleet.registry.bundles import add_bundle, bundle_rows, serving_workers, wanted_bundles
from fleet.registry.certificates import MakeCertificate, holder, keep_certificate
from fleet.registry.configs import Target, change_settings, current_settings, desired_configs
from fleet.registry.counting import By, Question
from fleet.registry.database import open_database
from fleet.registry.devices import check_device, is_device, is_online
from fleet.registry.enrolment import enroll
from fleet.registry.everybody import all_grants
from fleet.registry.models import (
    AllowedTarget,
    GenerationRecord,
    IdentityRecord,
    SessionRecord,
    StatusRecord,
    WorkerRecord,
)
from fleet.registry.reports import Fate, Key, store_report, store_reports, store_status, store_worker
from fleet.registry.retention import forget
from fleet.registry.revocation import denied, knows_certificate, revoked_certificates
from fleet.registry.rolling import change_rollout, start_rollout, take_step
from fleet.registry.rollout_looks import due_steps, rollout_rows
from fleet.registry.rollout_states import RolloutEvent
from fleet.registry.rollouts import Plan
from fleet.registry.rows import (
    AuditRow,
    BundleRow,
    BundleStats,
    Certified,
    DeviceRow,
    GroupStats,
    HourStats,
    IdentityRow,
    IssuedCertificate,
    NewToken,
    RevokedCertificate,
    RolloutRow,
    SessionRow,
    StatsRow,
    WorkerRow,
)
from fleet.registry.standing import change_state, renew
from fleet.registry.states import Change, State, next_state, state_at
from fleet.registry.statistics import device_stats, grouped_stats
from fleet.registry.tokens import Claim, add_token, join, name_of_token
from fleet.registry.transactions import Transactions
from fleet.report import DeviceStatus, GenerationReport, WorkerStatus


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
        """Enrols `name` with a certificate that the registry does not keep. `targets` are as in `Enrolment`.

        Raises:
            IdentityError: the name is taken (unless `replace`), is a group's, or the group's is a device's;
                a target is neither a device nor a group nor a tag.
        """
        wanted = Enrolment(name, role, group, targets=tuple(targets))

        def work(db: Session) -> None:
            record = enroll(db, wanted, replace=replace)
            record.state = next_state(name, State.PENDING, Change.JOIN)
            record.fingerprint, record.not_after = fingerprint, not_after
            self._audit_enrolment(db, wanted)

        self._transactions.write(work)

    def add_certified(self, enrolled: Iterable[tuple[Enrolment, IssuedCertificate]], *, replace: bool = False) -> None:
        """Enrols each with a certificate that was made for it: all of them, or none.

        Raises:
            IdentityError: as `add_identity`.
        """
        pairs = sorted(enrolled, key=lambda pair: pair[0].role is Role.APP)  # after the devices that they are allowed

        def work(db: Session) -> None:
            for wanted, issued in pairs:
                record = enroll(db, wanted, replace=replace)
                record.state = next_state(wanted.name, State.PENDING, Change.JOIN)
                keep_certificate(db, record, issued)
                self._audit_enrolment(db, wanted, serial=issued.serial)

        self._transactions.write(work)

    def enroll(self, enrolments: Iterable[Enrolment], ttl_s: float, *, replace: bool = False) -> list[NewToken]:
        """Makes or changes identities that wait to join, all of them or none: a token each, good for `ttl_s` seconds.

        Raises:
            IdentityError: as `add_identity`.
        """
        wanted = list(enrolments)

        def work(db: Session) -> list[NewToken]:
            tokens = {}
            for each in sorted(wanted, key=lambda each: each.role is Role.APP):
                enroll(db, each, replace=replace)
                tokens[each.name] = token = add_token(db, each.name, ttl_s, time.time())
                self._audit_enrolment(db, each, token=token.id, expires_at=token.expires_at)
            return [tokens[each.name] for each in wanted]

        return self._transactions.write(work)

    def _audit_enrolment(self, db: Session, enrolment: Enrolment, **details: str | float) -> None:
        described = {"role": enrolment.role.value, "group": enrolment.group, "allow": list(enrolment.targets)}
        audit(db, self.actor, Change.ENROLL, enrolment.name, **described, tags=enrolment.tags, **details)

    def join(self, claim: Claim, make: MakeCertificate, *, actor: str, now: float | None = None) -> Certified:
        """Uses a token up: the first key that brings it gets a certificate, and the very same when it asks again.

        `actor` is who asks, for the audit log.

        Raises:
            UnknownTokenError: no such token, or another secret.
            UsedTokenError: another key was first.
            ExpiredTokenError: nobody used it in time.
            TokenNameError: the claim has a name, and the token is for another.
            StateError: the identity was suspended, revoked or has expired.
        """
        at = now or time.time()
        try:
            return self._transactions.write(lambda db: join(db, actor, claim, make, at))
        except (TokenError, StateError) as error:
            code = error.code
            self._transactions.write(
                lambda db: audit(
                    db, actor, "join_refused", name_of_token(db, claim.id) or claim.id, token=claim.id, code=code
                )
            )
            raise

    def renew(
        self,
        fingerprint: str,
        key_hash: str,
        make: MakeCertificate,
        *,
        csr_name: str | None = None,
        now: float | None = None,
    ) -> Certified:
        """A certificate for another key of whoever holds the one with `fingerprint`, and the same when asked again.

        Raises:
            CredentialsError: nobody holds it.
            StateError: it was revoked, or its identity is not active.
            TokenNameError: `csr_name` is given and is another's.
            CsrError: the key is the same.
        """
        at = now or time.time()
        return self._transactions.write(lambda db: renew(db, fingerprint, key_hash, csr_name, make, at))

    def role_of(self, fingerprint: str, now: float | None = None) -> tuple[str, Role]:
        """The name and role of whoever holds a certificate.

        Raises:
            CredentialsError: nobody holds it.
            StateError: it was revoked, or its identity is not active.
        """
        with self._transactions.reading() as db:
            record = holder(db, fingerprint, now or time.time())
            return record.name, Role(record.role)

    def suspend(self, name: str) -> None:
        """Takes an identity's rights away until it is resumed.

        Raises:
            UnknownDeviceError: nobody enrolled `name`.
            StateError: it is not active.
        """
        self._change_state(name, Change.SUSPEND)

    def resume(self, name: str) -> None:
        """Raises UnknownDeviceError, or StateError when it is not suspended."""
        self._change_state(name, Change.RESUME)

    def revoke(self, name: str) -> None:
        """Takes an identity's rights away for good, and revokes its certificates.

        Raises:
            UnknownDeviceError: nobody enrolled `name`.
        """
        self._change_state(name, Change.REVOKE)

    def _change_state(self, name: str, change: Change) -> None:
        self._transactions.write(lambda db: change_state(db, self.actor, name, change, time.time()))

    def identities(self, role: Role | None = None) -> list[IdentityRow]:
        """Everyone that was enrolled, by name; only those of `role` when it is given."""
        query, now = select(IdentityRecord).order_by(IdentityRecord.name), time.time()
        with self._transactions.reading() as db:
            records = db.scalars(query.where(IdentityRecord.role == role) if role else query).all()
            allowed = db.execute(select(AllowedTarget.app, AllowedTarget.target).order_by(AllowedTarget.target)).all()
            tags = all_tags(db)
        return [
            IdentityRow(
                record.name,
                record.role,
                record.group,
                tuple(target for app, target in allowed if app == record.name),
                record.fingerprint,
                record.created_at,
                record.not_after,
                state_at(record.state, record.not_after, now),
                tags.get(record.name, {}),
            )
            for record in records
        ]

    def grants(self, name: str) -> Grants | None:
        """What `name` may do, with today's groups and tags; None for who is unknown, suspended, revoked or expired."""
        with self._transactions.reading() as db:
            record = db.get(IdentityRecord, name)
            if record is None or state_at(record.state, record.not_after, time.time()) is not State.ACTIVE:
                return None
            return Grants(Role(record.role), name, targets_of(db, record))

    def allow(self, app: str, targets: Iterable[str]) -> None:
        """Lets an app prompt more devices, and them hear its events: devices, groups, or tags ``key=value``.

        Raises:
            IdentityError: `app` is no app, or a target is neither a device nor a group nor a tag.
        """
        wanted = tuple(targets)
        self._transactions.write(lambda db: allow(db, self.actor, app, wanted))

    def disallow(self, app: str, targets: Iterable[str]) -> None:
        """Takes back what was allowed, by the same words.

        Raises:
            IdentityError: `app` is no app, or was not allowed one of them.
        """
        taken = tuple(targets)
        self._transactions.write(lambda db: disallow(db, self.actor, app, taken))

    def tag(self, device: str, tags: Mapping[str, str], remove: Iterable[str] = ()) -> None:
        """Sets tags of a device, and takes those away whose keys are in `remove`.

        Raises:
            UnknownDeviceError: nobody enrolled it.
        """
        gone = tuple(remove)
        self._transactions.write(lambda db: change_tags(db, self.actor, device, tags, gone))

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

    def record_reports(self, reports: dict[Key, GenerationReport]) -> dict[Key, Fate]:
        """Stores reports by device and generation in one transaction; what became of each."""
        return self._transactions.write(lambda db: store_reports(db, reports))

    def workers(self) -> list[WorkerRow]:
        """Every worker that was ever heard, by name."""
        with self._transactions.reading() as db:
            return [
                WorkerRow(
                    row.worker,
                    row.online,
                    row.draining,
                    tuple(row.bundle_ids),
                    row.num_sessions,
                    row.version,
                    row.last_seen,
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
                    identity.name,
                    identity.group,
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

    def add_bundle(self, bundle_id: str, model: str, num_bytes: int) -> bool:
        """Keeps that the server has a bundle's files; False when that was known."""
        return self._transactions.write(lambda db: add_bundle(db, self.actor, bundle_id, model, num_bytes))

    def bundles(self) -> list[BundleRow]:
        """Every bundle that was added, the newest first."""
        with self._transactions.reading() as db:
            return bundle_rows(db)

    def wanted_bundles(self) -> dict[str, int]:
        """How many devices are wanted on each bundle; 0 for one that is used, or that an open roll-out brings."""
        with self._transactions.reading() as db:
            return wanted_bundles(db)

    def serving_workers(self) -> dict[str, list[str]]:
        """The workers that take sessions, by bundle."""
        with self._transactions.reading() as db:
            return serving_workers(db)

    def start_rollout(self, bundle_id: str, plan: Plan, now: float | None = None) -> int:
        """Begins to bring a bundle to devices, stage by stage; gives the roll-out's id.

        Raises:
            RolloutError: the plan is not usable, the bundle is unknown, there is no such device, or another roll-out is
                open over some of them.
        """
        at = now or time.time()
        return self._transactions.write(lambda db: start_rollout(db, self.actor, bundle_id, plan, at))

    def change_rollout(self, rollout: int | None, event: RolloutEvent, now: float | None = None) -> int:
        """Pauses, resumes or undoes a roll-out, None for the open one; gives its id.

        Raises:
            RolloutError: there is none, more than one, or the change is not legal in its state.
        """
        at = now or time.time()
        return self._transactions.write(lambda db: change_rollout(db, self.actor, rollout, event, at))

    def step_rollouts(self, now: float, heard_since: float) -> None:
        """Takes every open roll-out a step further; statuses are heard since `heard_since` only."""
        with self._transactions.reading() as db:
            due = due_steps(db, now, heard_since)
        for each in due:
            self._transactions.write(lambda db, each=each: take_step(db, each, now))  # type: ignore[misc]

    def rollouts(self, now: float | None = None, limit: int = 20) -> list[RolloutRow]:
        """The latest roll-outs, newest first, and how far the open ones are."""
        with self._transactions.reading() as db:
            return rollout_rows(db, now or time.time(), limit)


def _total(column: SQLColumnExpression[int]) -> SQLColumnExpression[int]:
    return func.coalesce(func.sum(column), 0)
