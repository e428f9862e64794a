"""Certificates that the fleet's authority gave out: whose they are, and whether they still count."""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from fleet.errors import CredentialsError, StateError
from fleet.protocol.access import Role
from fleet.registry.identities.states import IdentityState, state_at
from fleet.registry.models import CertificateRecord, IdentityRecord
from fleet.registry.results import IssuedCertificate

MakeCertificate = Callable[[str, Role], IssuedCertificate]
"""Signs for a name and its role."""


def keep_certificate(db: Session, record: IdentityRecord, issued: IssuedCertificate) -> None:
    """Makes `issued` the newest certificate of an identity."""
    record.fingerprint = issued.fingerprint
    record.not_after = issued.not_after
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
    certificate = db.scalar(
        select(CertificateRecord).where(CertificateRecord.fingerprint == fingerprint)
    )
    # One from before there was a table of certificates is known to its identity alone.
    known = (
        IdentityRecord.name == certificate.name
        if certificate
        else IdentityRecord.fingerprint == fingerprint
    )
    record = db.scalar(select(IdentityRecord).where(known))
    if record is None:
        raise CredentialsError(
            "the registry does not know this certificate; enrol again with 'fleet enroll NAME'"
        )
    state = state_at(record.state, record.not_after, now)
    if state is not IdentityState.ACTIVE:
        raise StateError(
            f"{record.name!r} is {state}: expected {IdentityState.ACTIVE}; ask the fleet's operator"
        )
    if certificate and certificate.revoked_at is not None:
        raise StateError(
            f"this certificate of {record.name!r} was revoked; use the newest, or enrol again"
        )
    return record
