"""The keys of apps for the HTTP API, inside a transaction."""

from __future__ import annotations

from typing import Final

from sqlalchemy import ColumnElement, and_, delete, func, or_, select, update
from sqlalchemy.orm import Session

from fleet.errors import ConfigError, CredentialsError, StateError
from fleet.protocol.access import Role
from fleet.protocol.api_key import ApiKey
from fleet.registry.identities.lifecycle import IdentityState
from fleet.registry.models import ApiKeyRecord, IdentityRecord
from fleet.registry.results import ApiKeyRow, StoredKey

MAX_KEYS: Final = 100
"""Keys of one app that are valid at the same time."""

USABLE: Final = (IdentityState.PENDING, IdentityState.ACTIVE)
"""Stored states of an app that may use its keys. It needs no certificate for that."""


def add_key(db: Session, app: str, expires_at: float | None, now: float) -> ApiKey:
    """Create a key for an app. Raises ConfigError when it has `MAX_KEYS` valid keys."""
    valid = _is_valid(now)
    count = select(func.count()).select_from(ApiKeyRecord).where(ApiKeyRecord.app == app, valid)
    if (db.scalar(count) or 0) >= MAX_KEYS:
        raise ConfigError(
            f"{app!r} has {MAX_KEYS} keys, which is the most; revoke one with 'fleet key revoke ID'"
        )
    key = ApiKey.new()
    record = ApiKeyRecord(
        id=key.id, app=app, secret_hash=key.secret_hash, created_at=now, expires_at=expires_at
    )
    db.add(record)
    return key


def check_may_use_keys(app: IdentityRecord) -> None:
    """Raise StateError when an app is suspended or revoked."""
    if app.state not in USABLE:
        change = "resume" if app.state == IdentityState.SUSPENDED else "enroll"
        raise StateError(
            f"cannot create a key for {app.name!r}, which is {app.state}; "
            f"first give 'fleet {change} {app.name}'"
        )


def revoke_key(db: Session, key_id: str, now: float) -> str:
    """Revoke a key for good; return the name of its app.

    Raises:
        CredentialsError: there is no key of this id.
    """
    record = db.get(ApiKeyRecord, key_id, with_for_update=True)
    if record is None:
        raise CredentialsError(
            f"unknown key {key_id[:80]!r}: expected the id of a key; see 'fleet key list'"
        )
    record.revoked_at = record.revoked_at or now
    return record.app


def revoke_keys(db: Session, app: str, now: float) -> None:
    """Revoke all keys of an app."""
    is_own = (ApiKeyRecord.app == app, ApiKeyRecord.revoked_at.is_(None))
    db.execute(update(ApiKeyRecord).where(*is_own).values(revoked_at=now))


def delete_keys(db: Session, app: str) -> None:
    """Delete all keys of an app."""
    db.execute(delete(ApiKeyRecord).where(ApiKeyRecord.app == app))


def stored_keys(db: Session, now: float) -> dict[str, StoredKey]:
    """Return the keys that may be used now, by their ids."""
    is_app = and_(IdentityRecord.role == Role.APP, IdentityRecord.state.in_(USABLE))
    query = (
        select(ApiKeyRecord)
        .join(IdentityRecord, IdentityRecord.name == ApiKeyRecord.app)
        .where(is_app, _is_valid(now))
    )
    return {
        record.id: StoredKey(record.app, record.secret_hash, record.expires_at)
        for record in db.scalars(query)
    }


def key_rows(db: Session, app: str | None, now: float) -> list[ApiKeyRow]:
    """Return the keys of all apps, or of one, by app and then by age."""
    query = (
        select(ApiKeyRecord, IdentityRecord.state)
        .join(IdentityRecord, IdentityRecord.name == ApiKeyRecord.app)
        .order_by(ApiKeyRecord.app, ApiKeyRecord.created_at, ApiKeyRecord.id)
    )
    if app is not None:
        query = query.where(ApiKeyRecord.app == app)
    return [
        ApiKeyRow(
            id=record.id,
            app=record.app,
            state=_state(record, app_state, now),
            created_at=record.created_at,
            expires_at=record.expires_at,
        )
        for record, app_state in db.execute(query)
    ]


def _is_valid(now: float) -> ColumnElement[bool]:
    expires_at = ApiKeyRecord.expires_at
    return and_(ApiKeyRecord.revoked_at.is_(None), or_(expires_at.is_(None), expires_at > now))


def _state(record: ApiKeyRecord, app_state: str, now: float) -> str:
    if record.revoked_at is not None:
        return "revoked"
    if record.expires_at is not None and record.expires_at <= now:
        return "expired"
    return "active" if app_state in USABLE else app_state
