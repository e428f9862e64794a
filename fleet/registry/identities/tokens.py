"""Enrolment tokens: each is for one name, and the first key that presents its secret uses it up."""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass, field
from typing import Final

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from fleet.errors import ExpiredTokenError, UnknownTokenError, UsedTokenError
from fleet.registry.audit import audit
from fleet.registry.identities.certificates import (
    MakeCertificate,
    certificate_of_key,
    check_csr_name,
    issue_certificate,
    state_after,
)
from fleet.registry.identities.lifecycle import IdentityChange
from fleet.registry.models import IdentityRecord, TokenRecord
from fleet.registry.results import Certified, NewToken, TokenRow

ID_BYTES: Final = 8
SECRET_BYTES: Final = 32


@dataclass(frozen=True)
class Claim:
    """A request to join: a token, and the SHA-256 of the key's SPKI.

    `name` is that of the signing request, where it has one.
    """

    id: str
    secret: str = field(repr=False)
    key_hash: str
    name: str | None = None

    @property
    def secret_hash(self) -> str:
        """The hash of the secret, as the registry stores it."""
        return hash_secret(self.secret)


def hash_secret(secret: str) -> str:
    """Return SHA-256 in hex: 256 random bits need no salt and no slow hash."""
    return hashlib.sha256(secret.encode()).hexdigest()


def add_token(db: Session, name: str, ttl_s: float, now: float) -> NewToken:
    """Create a token for `name` that is valid for `ttl_s` seconds."""
    token = NewToken(
        name=name,
        id=secrets.token_hex(ID_BYTES),
        secret=secrets.token_hex(SECRET_BYTES),
        expires_at=now + ttl_s,
    )
    db.flush()
    db.add(
        TokenRecord(
            id=token.id,
            name=name,
            secret_hash=hash_secret(token.secret),
            created_at=now,
            expires_at=token.expires_at,
        )
    )
    return token


def open_tokens(db: Session, now: float) -> list[TokenRow]:
    """Return the tokens that can be used now, by their end."""
    query = (
        select(TokenRecord, IdentityRecord.role)
        .join(IdentityRecord, IdentityRecord.name == TokenRecord.name)
        .where(TokenRecord.used_at.is_(None), TokenRecord.expires_at > now)
        .order_by(TokenRecord.expires_at, TokenRecord.id)
    )
    return [
        TokenRow(
            id=token.id,
            name=token.name,
            role=role,
            created_at=token.created_at,
            expires_at=token.expires_at,
        )
        for token, role in db.execute(query)
    ]


def delete_tokens(db: Session, name: str) -> None:
    """Delete all tokens of `name`, used or not."""
    db.execute(delete(TokenRecord).where(TokenRecord.name == name))


def join(db: Session, actor: str, claim: Claim, make: MakeCertificate, now: float) -> Certified:
    """Use a token up for a key, or return the certificate that the key got for it before.

    Raises:
        UnknownTokenError: there is no such token, or its secret is another.
        UsedTokenError: another key has used it.
        ExpiredTokenError: it was not used in time.
        TokenNameError: the claim has a name, and the token is for another.
        StateError: the identity is suspended, revoked or expired.
    """
    record = _locked_identity(db, claim)
    is_first = _use(db, claim, now)
    token = db.get(TokenRecord, claim.id)
    if token is None:
        raise _unknown()
    state = state_after(record, IdentityChange.JOIN, now)
    if token.key_hash != claim.key_hash:
        raise _unusable(token)
    check_csr_name(claim.name, record, "token")
    if not is_first:
        certificate = certificate_of_key(db, record.name, claim.key_hash)
        if certificate is None:
            raise _unusable(token)
        return Certified(record.name, record.role, certificate.pem)
    issued = issue_certificate(db, record, make, state)
    audit(db, actor, IdentityChange.JOIN, record.name, token=claim.id, serial=issued.serial)
    return Certified(record.name, record.role, issued.pem)


def name_of_token(db: Session, token_id: str) -> str | None:
    """Return the name that the token with this id is for, whatever its secret."""
    return db.scalar(select(TokenRecord.name).where(TokenRecord.id == token_id))


def _locked_identity(db: Session, claim: Claim) -> IdentityRecord:
    """Lock the identity before the token, in the order of an enrolment: no deadlock."""
    name = db.scalar(
        select(TokenRecord.name).where(
            TokenRecord.id == claim.id, TokenRecord.secret_hash == claim.secret_hash
        )
    )
    record = db.get(IdentityRecord, name, with_for_update=True) if name else None
    if record is None:
        raise _unknown()
    return record


def _use(db: Session, claim: Claim, now: float) -> bool:
    """Use the token up in one statement; return whether this claim was the first."""
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
        "unknown token: it was never made, or a newer one has replaced it; "
        "make one with 'fleet enroll NAME'"
    )


def _unusable(token: TokenRecord) -> UsedTokenError | ExpiredTokenError:
    advice = "make a new one with 'fleet enroll NAME'"
    if token.used_at is not None:
        return UsedTokenError(f"another key has used this token of {token.name!r}; {advice}")
    return ExpiredTokenError(f"the time of this token of {token.name!r} is over; {advice}")
