"""The repository of operators, their links, sessions and keys."""

from __future__ import annotations

import time
from typing import Final, NamedTuple

from sqlalchemy import ColumnElement, and_, delete, func, or_, select
from sqlalchemy.orm import Session

from fleet.errors import ConfigError, CredentialsError
from fleet.protocol.topics import check_name
from fleet.registry.audit import audit
from fleet.registry.models import OperatorRecord, OperatorSecretRecord
from fleet.registry.operators.operator_secret import OperatorSecret, OperatorSecretKind
from fleet.registry.results import OperatorKeyRow, OperatorRow
from fleet.registry.transactions import Repository

LINK_S: Final = 900.0
SESSION_S: Final = 12 * 3600.0
IDLE_S: Final = 2 * 3600.0
USE_INTERVAL_S: Final = 60.0  # between two writes of a session's last use
MAX_SECRETS: Final = 100  # of one operator and one kind


class KnownOperator(NamedTuple):
    """The operator of a secret that is valid; `role` is an `OperatorRole`."""

    name: str
    role: str


class NewOperatorSecret(NamedTuple):
    """A new secret, which is shown once; `expires_at` is in seconds since 1970."""

    secret: OperatorSecret
    operator: str
    expires_at: float | None


class OperatorRepository(Repository):
    """Operators and their secrets. Each method is one transaction."""

    def add(self, name: str, role: str) -> None:
        """Add an operator.

        Raises:
            TopicError: the name is not valid.
            ConfigError: there is one of this name.
        """
        check_name(name, "operator")

        def work(db: Session) -> None:
            if db.get(OperatorRecord, name, with_for_update=True) is not None:
                raise ConfigError(
                    f"there is an operator {name!r}; choose another name, or change the role with "
                    f"'fleet operator role {name} {role}'"
                )
            db.add(OperatorRecord(name=name, role=role, created_at=time.time()))
            audit(db, self.actor, "operator_add", name, role=role)

        self._transactions.write(work)

    def all(self) -> list[OperatorRow]:
        """Return every operator, by name."""
        now = time.time()
        with self._transactions.reading() as db:
            secrets = db.scalars(select(OperatorSecretRecord).where(_is_valid(now))).all()
            return [
                _row(record, [each for each in secrets if each.operator == record.name])
                for record in db.scalars(select(OperatorRecord).order_by(OperatorRecord.name))
            ]

    def set_role(self, name: str, role: str) -> None:
        """Change the role of an operator, also for sessions that are open.

        Raises:
            ConfigError: there is no operator of this name.
        """

        def work(db: Session) -> None:
            _known(db, name).role = role
            audit(db, self.actor, "operator_role", name, role=role)

        self._transactions.write(work)

    def remove(self, name: str) -> None:
        """Remove an operator with all secrets.

        Raises:
            ConfigError: there is no operator of this name.
        """

        def work(db: Session) -> None:
            record = _known(db, name)
            secret = OperatorSecretRecord
            db.execute(delete(secret).where(secret.operator == name))
            db.delete(record)
            audit(db, self.actor, "operator_remove", name)

        self._transactions.write(work)

    def make_link(self, name: str) -> NewOperatorSecret:
        """Make a link with which an operator signs in once, within `LINK_S` seconds.

        Raises:
            ConfigError: there is no operator of this name, or it has too many links.
        """
        return self._make(name, OperatorSecretKind.LINK, LINK_S)

    def create_key(self, name: str, life_s: float | None) -> NewOperatorSecret:
        """Create a key for the scripts of an operator; None is a life without an end.

        Raises:
            ConfigError: there is no operator of this name, or it has too many keys.
        """
        return self._make(name, OperatorSecretKind.KEY, life_s)

    def sign_in(self, link: str) -> NewOperatorSecret:
        """Use a link up; return a new session.

        Raises:
            CredentialsError: the link is unknown, used or expired.
        """
        parsed = OperatorSecret.parse(OperatorSecretKind.LINK, link)
        now = time.time()

        def work(db: Session) -> NewOperatorSecret:
            record = _found(db, parsed)
            if record.used_at is not None or _has_ended(record, now):
                reason = "was used" if record.used_at is not None else "is too old"
                raise CredentialsError(f"this link {reason}; make another one, and open it once")
            record.used_at = now
            audit(db, record.operator, "operator_sign_in", record.operator)
            return _add(db, record.operator, OperatorSecretKind.SESSION, SESSION_S, now)

        return self._transactions.write(work)

    def sign_out(self, session: str) -> None:
        """End a session. Raises CredentialsError if there is none."""
        parsed = OperatorSecret.parse(OperatorSecretKind.SESSION, session)

        def work(db: Session) -> None:
            record = _found(db, parsed)
            audit(db, record.operator, "operator_sign_out", record.operator)
            db.delete(record)

        self._transactions.write(work)

    def authenticate(self, kind: OperatorSecretKind, text: str) -> KnownOperator:
        """Return the operator of a session or a key.

        Raises:
            CredentialsError: it is unknown, or its time is over.
        """
        parsed = OperatorSecret.parse(kind, text)
        now = time.time()
        with self._transactions.reading() as db:
            record = _found(db, parsed)
            if _has_ended(record, now):
                raise CredentialsError(f"this {kind} has ended; use another one")
            operator = db.get_one(OperatorRecord, record.operator)
            known = KnownOperator(operator.name, operator.role)
            is_due = now - (record.used_at or 0.0) >= USE_INTERVAL_S
        if is_due:
            self._transactions.write(lambda db: _note_use(db, parsed.id, now))
        return known

    def keys(self, name: str | None = None) -> list[OperatorKeyRow]:
        """Return the keys of all operators, or of one, by operator and age."""
        now = time.time()
        record = OperatorSecretRecord
        query = (
            select(record)
            .where(record.kind == OperatorSecretKind.KEY)
            .order_by(record.operator, record.created_at, record.id)
        )
        if name is not None:
            query = query.where(record.operator == name)
        with self._transactions.reading() as db:
            return [_key_row(each, now) for each in db.scalars(query)]

    def revoke_key(self, key_id: str) -> str:
        """Delete a key; return the name of its operator.

        Raises:
            CredentialsError: there is no key of this id.
        """

        def work(db: Session) -> str:
            record = db.get(OperatorSecretRecord, key_id, with_for_update=True)
            if record is None or record.kind != OperatorSecretKind.KEY:
                raise CredentialsError(
                    f"unknown key {key_id[:80]!r}: expected the id of a key; see 'fleet operator "
                    "key list'"
                )
            audit(db, self.actor, "operator_key_revoke", record.operator, key=key_id)
            db.delete(record)
            return record.operator

        return self._transactions.write(work)

    def _make(self, name: str, kind: OperatorSecretKind, life_s: float | None) -> NewOperatorSecret:
        now = time.time()

        def work(db: Session) -> NewOperatorSecret:
            _known(db, name)
            new = _add(db, name, kind, life_s, now)
            details = {"id": new.secret.id, "expires_at": new.expires_at}
            audit(db, self.actor, f"operator_{kind}", name, **details)
            return new

        return self._transactions.write(work)


def _add(
    db: Session, name: str, kind: OperatorSecretKind, life_s: float | None, now: float
) -> NewOperatorSecret:
    record = OperatorSecretRecord
    is_own = and_(record.operator == name, record.kind == kind)
    db.execute(delete(record).where(is_own, record.expires_at <= now))
    if (db.scalar(select(func.count()).select_from(record).where(is_own)) or 0) >= MAX_SECRETS:
        raise ConfigError(f"{name!r} has {MAX_SECRETS} of this kind ({kind}), which is the most")
    secret = OperatorSecret.new(kind)
    expires_at = None if life_s is None else now + life_s
    added = record(
        id=secret.id,
        operator=name,
        kind=kind.value,
        secret_hash=secret.secret_hash,
        created_at=now,
        expires_at=expires_at,
        used_at=now if kind is OperatorSecretKind.SESSION else None,
    )
    db.add(added)
    return NewOperatorSecret(secret, name, expires_at)


def _known(db: Session, name: str) -> OperatorRecord:
    record = db.get(OperatorRecord, name, with_for_update=True)
    if record is None:
        raise ConfigError(
            f"there is no operator {name[:80]!r}; see 'fleet operator list', or add it with "
            "'fleet operator add NAME'"
        )
    return record


def _found(db: Session, secret: OperatorSecret) -> OperatorSecretRecord:
    record = db.get(OperatorSecretRecord, secret.id)
    if record is None or record.kind != secret.kind or not secret.has_hash(record.secret_hash):
        raise CredentialsError(f"this {secret.kind} is unknown or was ended; use another one")
    return record


def _has_ended(record: OperatorSecretRecord, now: float) -> bool:
    is_idle = record.kind == OperatorSecretKind.SESSION and now - (record.used_at or 0) > IDLE_S
    return is_idle or (record.expires_at is not None and record.expires_at <= now)


def _is_valid(now: float) -> ColumnElement[bool]:
    expires_at = OperatorSecretRecord.expires_at
    return or_(expires_at.is_(None), expires_at > now)


def _note_use(db: Session, secret_id: str, now: float) -> None:
    record = db.get(OperatorSecretRecord, secret_id)
    if record is not None:
        record.used_at = now


def _row(record: OperatorRecord, secrets: list[OperatorSecretRecord]) -> OperatorRow:
    sessions = [each for each in secrets if each.kind == OperatorSecretKind.SESSION]
    return OperatorRow(
        name=record.name,
        role=record.role,
        created_at=record.created_at,
        num_sessions=len(sessions),
        num_keys=sum(each.kind == OperatorSecretKind.KEY for each in secrets),
        last_seen=max((each.used_at or each.created_at for each in sessions), default=None),
    )


def _key_row(record: OperatorSecretRecord, now: float) -> OperatorKeyRow:
    return OperatorKeyRow(
        id=record.id,
        operator=record.operator,
        state="expired" if _has_ended(record, now) else "active",
        created_at=record.created_at,
        expires_at=record.expires_at,
    )
