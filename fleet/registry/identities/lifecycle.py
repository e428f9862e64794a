"""How an identity stands: renewed, suspended, resumed, revoked. Every change goes through `next_state`."""

from __future__ import annotations

from sqlalchemy.orm import Session

from fleet.errors import CsrError, TokenNameError, UnknownDeviceError
from fleet.protocol.access import Role
from fleet.registry.audit import audit
from fleet.registry.identities.certificates import (
    MakeCertificate,
    certificate_of_key,
    holder,
    keep_certificate,
    revoke_certificates,
)
from fleet.registry.identities.states import IdentityChange, IdentityState, next_state, state_at
from fleet.registry.models import IdentityRecord
from fleet.registry.results import Certified


def change_state(
    db: Session, actor: str, name: str, change: IdentityChange, now: float
) -> IdentityState:
    """The new state of `name` after a change that an operator makes.

    Raises:
        UnknownDeviceError: nobody enrolled `name`.
        StateError: the change is not legal in its state.
    """
    record = db.get(IdentityRecord, name, with_for_update=True)
    if record is None:
        raise UnknownDeviceError(f"nobody enrolled {name[:80]!r}; see 'fleet devices' for who is")
    state = next_state(name, state_at(record.state, record.not_after, now), change)
    details = (
        {"serials": revoke_certificates(db, name, now)} if change is IdentityChange.REVOKE else {}
    )
    record.state = state
    audit(db, actor, change, name, **details)
    return state


def renew(
    db: Session,
    fingerprint: str,
    key_hash: str,
    csr_name: str | None,
    make: MakeCertificate,
    now: float,
) -> Certified:
    """A certificate for another key of whoever holds one. See `Registry.renew`."""
    record = holder(db, fingerprint, now)
    db.refresh(record, with_for_update=True)
    db.expire_all()  # whoever held the record's lock before us may have revoked the certificate
    holder(db, fingerprint, now)
    state = next_state(
        record.name, state_at(record.state, record.not_after, now), IdentityChange.RENEW
    )
    if csr_name not in (None, record.name):
        raise TokenNameError(
            f"the signing request is for {str(csr_name)[:80]!r}: expected the certificate's {record.name!r}, or no name"
        )
    known = certificate_of_key(db, record.name, key_hash)
    if known and known.fingerprint == fingerprint:
        raise CsrError(
            "the signing request is for the key of the certificate itself: expected a new key"
        )
    if known and known.not_after > now:
        return Certified(record.name, record.role, known.pem)
    issued = make(record.name, Role(record.role))
    record.state = state
    keep_certificate(db, record, issued)
    audit(db, record.name, IdentityChange.RENEW, record.name, serial=issued.serial)
    return Certified(record.name, record.role, issued.pem)
