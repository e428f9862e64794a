"""Certificates that the fleet's authority issued, and the lists of those that are revoked."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

from sqlalchemy import ColumnElement, and_, or_, select, update
from sqlalchemy.orm import Session

from fleet.errors import CredentialsError, CsrError, StateError, TokenNameError
from fleet.protocol.access import Role
from fleet.registry.audit import audit
from fleet.registry.identities.lifecycle import (
    IdentityChange,
    IdentityState,
    next_state,
    state_at,
)
from fleet.registry.models import CertificateRecord, IdentityRecord
from fleet.registry.results import Certified, IssuedCertificate, RevokedCertificate

MakeCertificate = Callable[[str, Role], IssuedCertificate]
"""Signs a certificate for a name and its role."""

BARRED = (IdentityState.SUSPENDED, IdentityState.REVOKED, IdentityState.DELETED)


def keep_certificate(db: Session, record: IdentityRecord, issued: IssuedCertificate) -> None:
    """Store `issued` as the newest certificate of an identity."""
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
    """Return the newest certificate of `name` for one key, unless it was revoked."""
    query = (
        select(CertificateRecord)
        .where(CertificateRecord.name == name, CertificateRecord.key_hash == key_hash)
        .where(CertificateRecord.revoked_at.is_(None))
        .order_by(CertificateRecord.not_after.desc())
        .limit(1)
    )
    return db.scalar(query)


def knows_certificate(db: Session, name: str, fingerprint: str) -> bool:
    """Whether a certificate of `name` with this SHA-256 is valid: the newest, or not revoked."""
    stored = select(CertificateRecord.revoked_at).where(
        CertificateRecord.name == name, CertificateRecord.fingerprint == fingerprint
    )
    if row := db.execute(stored).first():
        return row.revoked_at is None
    newest = db.scalar(select(IdentityRecord.fingerprint).where(IdentityRecord.name == name))
    return bool(fingerprint) and newest == fingerprint


def valid_fingerprints(db: Session, fingerprints: Sequence[str]) -> defaultdict[str, set[str]]:
    """Return those of `fingerprints` for which `knows_certificate` is true, by name."""
    stored = select(
        CertificateRecord.name, CertificateRecord.fingerprint, CertificateRecord.revoked_at
    ).where(CertificateRecord.fingerprint.in_(fingerprints))
    newest = select(IdentityRecord.name, IdentityRecord.fingerprint).where(
        IdentityRecord.fingerprint.in_(fingerprints), IdentityRecord.fingerprint != ""
    )
    valid: defaultdict[str, set[str]] = defaultdict(set)
    for name, fingerprint in db.execute(newest):
        valid[name].add(fingerprint)
    for name, fingerprint, revoked_at in db.execute(stored):
        if revoked_at is None:
            valid[name].add(fingerprint)
        else:
            valid[name].discard(fingerprint)
    return valid


def revoke_certificates(db: Session, name: str, now: float) -> list[str]:
    """Revoke all certificates of `name`; return the serials of those that were valid until now."""
    valid = (CertificateRecord.name == name, CertificateRecord.revoked_at.is_(None))
    serials = list(db.scalars(select(CertificateRecord.serial).where(*valid)))
    db.execute(update(CertificateRecord).where(*valid).values(revoked_at=now))
    return serials


def revoked_certificates(db: Session, now: float) -> list[RevokedCertificate]:
    """Return the certificates that may not be used and have not expired yet, by serial.

    They are revoked, or their identity is suspended or revoked. Those of a suspended identity
    become valid again when it is resumed: they are on hold (RFC 5280 section 5.3.1).
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


def is_denied(now: float) -> ColumnElement[bool]:
    """Condition: the identity is suspended, revoked, deleted or expired."""
    has_expired = and_(
        IdentityRecord.state == IdentityState.ACTIVE, IdentityRecord.not_after <= now
    )
    return or_(IdentityRecord.state.in_(BARRED), has_expired)


def holder(db: Session, fingerprint: str, now: float) -> IdentityRecord:
    """Return the active identity that holds a certificate.

    Raises:
        CredentialsError: the registry does not know the certificate.
        StateError: the certificate was revoked, or its identity is not active.
    """
    is_certificate = CertificateRecord.fingerprint == fingerprint
    certificate = db.scalar(select(CertificateRecord).where(is_certificate))
    # A certificate from before the table of certificates is stored with its identity alone.
    is_holder = IdentityRecord.fingerprint == fingerprint
    if certificate:
        is_holder = IdentityRecord.name == certificate.name
    record = db.scalar(select(IdentityRecord).where(is_holder))
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


def renew(
    db: Session,
    fingerprint: str,
    key_hash: str,
    make: MakeCertificate,
    *,
    csr_name: str | None,
    now: float,
) -> Certified:
    """Issue a certificate for a new key to the holder of the one with `fingerprint`.

    `key_hash` is the SHA-256 of the new key's SPKI, `csr_name` the name in the signing request. A
    certificate that was issued for the key before is returned again.

    Raises:
        CredentialsError: the registry does not know the certificate.
        StateError: it was revoked, or its identity is not active.
        TokenNameError: the signing request has another name.
        CsrError: the key is that of the certificate itself.
    """
    record = holder(db, fingerprint, now)
    db.refresh(record, with_for_update=True)
    # The holder of the record's lock before us may have revoked the certificate.
    db.expire_all()
    holder(db, fingerprint, now)
    state = state_after(record, IdentityChange.RENEW, now)
    check_csr_name(csr_name, record, "certificate")
    earlier = certificate_of_key(db, record.name, key_hash)
    if earlier and earlier.fingerprint == fingerprint:
        raise CsrError(
            "the signing request is for the key of the certificate itself: expected a new key"
        )
    if earlier and earlier.not_after > now:
        return Certified(record.name, record.role, earlier.pem)
    issued = issue_certificate(db, record, make, state)
    audit(db, record.name, IdentityChange.RENEW, record.name, serial=issued.serial)
    return Certified(record.name, record.role, issued.pem)


def issue_certificate(
    db: Session, record: IdentityRecord, make: MakeCertificate, state: IdentityState
) -> IssuedCertificate:
    """Issue and store a certificate for an identity, which gets the new state."""
    issued = make(record.name, Role(record.role))
    record.state = state
    keep_certificate(db, record, issued)
    return issued


def state_after(record: IdentityRecord, change: IdentityChange, now: float) -> IdentityState:
    """Return the state that follows; raise StateError when the change is not legal."""
    return next_state(record.name, state_at(record.state, record.not_after, now), change)


def check_csr_name(name: str | None, record: IdentityRecord, owner: str) -> None:
    """Raise TokenNameError when a signing request has the name of another identity."""
    if name not in (None, record.name):
        raise TokenNameError(
            f"the signing request is for {str(name)[:80]!r}: "
            f"expected the {owner}'s {record.name!r}, or no name"
        )
