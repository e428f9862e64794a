"""Who is enrolled, and for what: checked and written in one transaction."""

from __future__ import annotations

import time

from sqlalchemy import and_, delete, exists, or_, select
from sqlalchemy.orm import Session

from fleet.errors import IdentityError
from fleet.identity.enrolment import Enrolment, is_tag
from fleet.registry.identities.certificates import revoke_certificates
from fleet.registry.identities.devices import is_device
from fleet.registry.identities.states import IdentityChange, IdentityState, next_state, state_at
from fleet.registry.identities.tokens import forget_tokens
from fleet.registry.models import AllowedTarget, IdentityRecord, TagRecord


def enroll(db: Session, enrolment: Enrolment, *, replace: bool) -> IdentityRecord:
    """Makes or changes an identity, which then waits for a certificate; what it had before counts no more.

    Raises:
        IdentityError: it is active or suspended (unless `replace`), its name is a group's, or its group's is a name;
            a target is neither a device nor a group.
    """
    now = time.time()
    known = db.get(IdentityRecord, enrolment.name, with_for_update=True)
    state = _next_state(known, now, replace=replace) if known else IdentityState.PENDING
    _check_names(db, enrolment.name, enrolment.group)
    for target in enrolment.targets:
        check_target(db, target)
    record = known or IdentityRecord(name=enrolment.name, created_at=now)
    record.role = enrolment.role.value
    record.group = enrolment.group
    record.state = state
    record.fingerprint = ""
    record.not_after = 0.0
    db.add(record)
    db.flush()
    if known:
        revoke_certificates(db, known.name, now)
        forget_tokens(db, known.name)
    _replace_details(db, enrolment)
    return record


def _next_state(known: IdentityRecord, now: float, *, replace: bool) -> IdentityState:
    state = state_at(known.state, known.not_after, now)
    if state in (IdentityState.ACTIVE, IdentityState.SUSPENDED):
        if not replace:
            raise IdentityError(
                f"{known.name!r} is enrolled already, as {known.role}; choose another name, or replace it with --force"
            )
        state = next_state(known.name, state, IdentityChange.REVOKE)
    return next_state(known.name, state, IdentityChange.ENROLL)


def _replace_details(db: Session, enrolment: Enrolment) -> None:
    db.execute(delete(AllowedTarget).where(AllowedTarget.app == enrolment.name))
    db.execute(delete(TagRecord).where(TagRecord.device == enrolment.name))
    db.add_all(
        AllowedTarget(app=enrolment.name, target=target)
        for target in dict.fromkeys(enrolment.targets)
    )
    db.add_all(
        TagRecord(device=enrolment.name, key=key, value=value)
        for key, value in enrolment.tags.items()
    )


def _check_names(db: Session, name: str, group: str | None) -> None:
    """A name is an identity's or a group's, never both: else allowing one would allow the other."""
    if db.scalar(select(exists().where(IdentityRecord.group == name))):
        raise IdentityError(f"{name!r} is the name of a group; choose another")
    if group == name or (group is not None and db.get(IdentityRecord, group) is not None):
        raise IdentityError(f"group {group!r} is the name of an identity; choose another")


def check_target(db: Session, target: str) -> None:
    """Raises IdentityError unless `target` is a device, a group of devices, or a tag ``key=value``."""
    if is_tag(target):
        return
    is_group = and_(is_device(), IdentityRecord.group == target)
    if not db.scalar(select(exists().where(or_(is_device(target), is_group)))):
        raise IdentityError(
            f"cannot allow {target[:80]!r}: it is no enrolled device, no group and no tag like floor=1; enrol it first"
        )
