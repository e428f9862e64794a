"""Enrolment tokens: made for a name, used up by the first key that brings the secret, and by no other."""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass, field
from typing import Final

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from fleet.errors import ExpiredTokenError, TokenNameError, UnknownTokenError, UsedTokenError
from fleet.protocol.access import Role
from fleet.registry.audit import audit
from fleet.registry.identities.certificates import (
    MakeCertificate,
    certificate_of_key,
    keep_certificate,
)
from fleet.registry.identities.states import IdentityChange, next_state, state_at
from fleet.registry.models import IdentityRecord, TokenRecord
from fleet.registry.results import Certified, NewToken

ID_BYTES: Final = 8
SECRET_BYTES: Final = 32


@dataclass(frozen=True)
class Claim:
    """Who wants to join: a token, and the SHA-256 of the key's SPKI; `name` where the signing request has one."""

    id: str
    secret: str = field(repr=False)
    key_hash: str
    name: str | None = None

    @property
    def secret_hash(self) -> str:
        """What the registry knows of the secret."""
        return hash_secret(self.secret)


def hash_secret(secret: str) -> str:
    """SHA-256 in hex: 256 random bits need no salt and no slow hash."""
    return hashlib.sha256(secret.encode()).hexdigest()


def add_token(db: Session, name: str, ttl_s: float, now: float) -> NewToken:
    """Makes a token of `name`."""
    made = NewToken(name, secrets.token_hex(ID_BYTES), secrets.token_hex(SECRET_BYTES), now + ttl_s)
    secret_hash = hash_secret(made.secret)
    db.flush()
    db.add(
        TokenRecord(
            id=made.id,
            name=name,
            secret_hash=secret_hash,
            created_at=now,
            expires_at=made.expires_at,
        )
    )
    return made


def forget_tokens(db: Session, name: str) -> None:
    """Makes all tokens of `name` unknown, used or not."""
    db.execute(delete(TokenRecord).where(TokenRecord.name == name))


def join(db: Session, actor: str, claim: Claim, make: MakeCertificate, now: float) -> Certified:
    """Uses a token up for a key. See `Registry.join`."""
    name = db.scalar(
        select(TokenRecord.name).where(
            TokenRecord.id == claim.id, TokenRecord.secret_hash == claim.secret_hash
        )
    )
    # The identity is locked before the token, as when it is enrolled anew; else the two could wait for each other.
    record = db.get(IdentityRecord, name, with_for_update=True) if name else None
    if record is None:
        raise _unknown()
    is_first = _use(db, claim, now)
    token = db.get(TokenRecord, claim.id)
    if token is None:
        raise _unknown()
    state = next_state(
        record.name, state_at(record.state, record.not_after, now), IdentityChange.JOIN
    )
    if token.key_hash != claim.key_hash:
        raise _unusable(token)
    if claim.name not in (None, record.name):
        raise TokenNameError(
            f"the signing request is for {str(claim.name)[:80]!r}: expected the token's {record.name!r}, or no name"
        )
    if not is_first:
        certificate = certificate_of_key(db, record.name, claim.key_hash)
        if certificate is None:
            raise _unusable(token)
        return Certified(record.name, record.role, certificate.pem)
    issued = make(record.name, Role(record.role))
    record.state = state
    keep_certificate(db, record, issued)
    audit(db, actor, IdentityChange.JOIN, record.name, token=claim.id, serial=issued.serial)
    return Certified(record.name, record.role, issued.pem)


def name_of_token(db: Session, token_id: str) -> str | None:
    """Whose token has this id, whatever its secret."""
    return db.scalar(select(TokenRecord.name).where(TokenRecord.id == token_id))


def _use(db: Session, claim: Claim, now: float) -> bool:
    """One statement decides who was first."""
    used = db.execute(
        update(TokenRecord)
        .where(TokenRecord.id == claim.id, TokenRecord.secret_hash == claim.secret_hash)
        .where(TokenRecord.used_at.is_(None), TokenRecord.expires_at > now)
        .values(used_at=now, key_hash=claim.key_hash)
        .returning(TokenRecord.id)
    )
    return used.first() is not None


def _unknown() -> UnknownTokenError:
    return UnknownTokenError(
        "unknown token: it was never made, or a newer one has replaced it; make one with 'fleet enroll NAME'"
    )


def _unusable(token: TokenRecord) -> UsedTokenError | ExpiredTokenError:
    what = "make a new one with 'fleet enroll NAME'"
    if token.used_at is not None:
        return UsedTokenError(f"another key has used this token of {token.name!r}; {what}")
    return ExpiredTokenError(f"the time of this token of {token.name!r} is over; {what}")
