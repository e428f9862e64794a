"""Certificates as the registry knows them: which still count, which do not any more, and whose devices are out."""

from __future__ import annotations

from sqlalchemy import ColumnElement, and_, or_, select
from sqlalchemy.orm import Session

from fleet.registry.identities.devices import is_device
from fleet.registry.identities.states import IdentityState
from fleet.registry.models import CertificateRecord, IdentityRecord
from fleet.registry.results import RevokedCertificate

BARRED = (IdentityState.SUSPENDED, IdentityState.REVOKED)


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


def _is_out(now: float) -> ColumnElement[bool]:
    has_expired = and_(
        IdentityRecord.state == IdentityState.ACTIVE, IdentityRecord.not_after <= now
    )
    return or_(IdentityRecord.state.in_(BARRED), has_expired)
