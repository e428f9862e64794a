"""Certificates that the fleet's authority gave out: whose they are, which still count, and whose devices are out."""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import ColumnElement, and_, or_, select, update
from sqlalchemy.orm import Session

from fleet.access import Role
from fleet.errors import CredentialsError, StateError
from fleet.registry.devices import is_device
from fleet.registry.models import CertificateRecord, IdentityRecord
from fleet.registry.rows import IssuedCertificate, RevokedCertificate
from fleet.registry.states import State, state_at

BARRED = (State.SUSPENDED, State.REVOKED)

MakeCertificate = Callable[[str, Role], IssuedCertificate]
"""Signs for a name and its role."""


def keep_certificate(db: Session, record: IdentityRecord, issued: IssuedCertificate) -> None:
    """Makes `issued` the newest certificate of an identity."""
    record.fingerprint, record.not_after = issued.fingerprint, issued.not_after
    db.flush()
    db.add(
        CertificateRecord(
            serial=issued.serial,
            name=record.name,
            fingerprint=issued.fingerprint,
            key_hash=issued.key_hash,
            pem=issued.pem,
            not_before=issued.not_before,
            not_after=issued.not_after,
        )
    )


def certificate_of_key(db: Session, name: str, key_hash: str) -> CertificateRecord | None:
    """The newest certificate of `name` for one key, unless it was revoked."""
    query = (
        select(CertificateRecord)
        .where(CertificateRecord.name == name, CertificateRecord.key_hash == key_hash)
        .where(CertificateRecord.revoked_at.is_(None))
        .order_by(CertificateRecord.not_after.desc())
        .limit(1)
    )
    return db.scalar(query)


def revoke_certificates(db: Session, name: str, now: float) -> list[str]:
    """Revokes all certificates of `name`; the serials of those that were not revoked before."""
    theirs = CertificateRecord.name == name, CertificateRecord.revoked_at.is_(None)
    serials = list(db.scalars(select(CertificateRecord.serial).where(*theirs)))
    db.execute(update(CertificateRecord).where(*theirs).values(revoked_at=now))
    return serials


def holder(db: Session, fingerprint: str, now: float) -> IdentityRecord:
    """The active identity whose certificate it is.

    Raises:
        CredentialsError: nobody's, as far as the registry knows.
        StateError: the certificate was revoked, or its identity is not active.
    """
    certificate = db.scalar(select(CertificateRecord).where(CertificateRecord.fingerprint == fingerprint))
    # One from before there was a table of certificates is known to its identity alone.
    known = IdentityRecord.name == certificate.name if certificate else IdentityRecord.fingerprint == fingerprint
    record = db.scalar(select(IdentityRecord).where(known))
    if record is None:
        raise CredentialsError("the registry does not know this certificate; enrol again with 'fleet enroll NAME'")
    state = state_at(record.state, record.not_after, now)
    if state is not State.ACTIVE:
        raise StateError(f"{record.name!r} is {state}: expected {State.ACTIVE}; ask the fleet's operator")
    if certificate and certificate.revoked_at is not None:
        raise StateError(f"this certificate of {record.name!r} was revoked; use the newest, or enrol again")
    return record


def knows_certificate(db: Session, name: str, fingerprint: str) -> bool:
    """Whether a certificate of `name` with this SHA-256 is the newest, or one of those kept and not revoked."""
    kept = select(CertificateRecord.revoked_at).where(
        CertificateRecord.name == name, CertificateRecord.fingerprint == fingerprint
    )
    if row := db.execute(kept).first():
        return row.revoked_at is None
    newest = db.scalar(select(IdentityRecord.fingerprint).where(IdentityRecord.name == name))
    return bool(fingerprint) and newest == fingerprint


def revoked_certificates(db: Session, now: float) -> list[RevokedCertificate]:
    """Those that may not be used and have not ended yet, by serial: revoked, or of who is suspended or revoked.

    The latter come back when the name is resumed: on hold, in the words of RFC 5280 section 5.3.1.
    """
    query = (
        select(CertificateRecord.serial, CertificateRecord.name, CertificateRecord.revoked_at)
        .join(IdentityRecord, IdentityRecord.name == CertificateRecord.name)
        .where(
            CertificateRecord.not_after > now,
            or_(CertificateRecord.revoked_at.is_not(None), IdentityRecord.state.in_(BARRED)),
        )
        .order_by(CertificateRecord.serial)
    )
    return [RevokedCertificate(*row) for row in db.execute(query)]


def denied(db: Session, now: float, limit: int) -> list[str]:
    """Names of the devices that are suspended, revoked or expired; those first whose certificate lives longest."""
    query = (
        select(IdentityRecord.name)
        .where(is_device(), _is_out(now))
        .order_by(IdentityRecord.not_after.desc(), IdentityRecord.name)
        .limit(limit)
    )
    return list(db.scalars(query))


def active_names(db: Session, now: float) -> list[str]:
    """Everybody who is active, by name."""
    is_active = and_(IdentityRecord.state == State.ACTIVE, IdentityRecord.not_after > now)
    return list(db.scalars(select(IdentityRecord.name).where(is_active).order_by(IdentityRecord.name)))


def _is_out(now: float) -> ColumnElement[bool]:
    has_expired = and_(IdentityRecord.state == State.ACTIVE, IdentityRecord.not_after <= now)
    return or_(IdentityRecord.state.in_(BARRED), has_expired)
