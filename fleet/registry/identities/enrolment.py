"""Enrolment of one identity: its checks and its rows, inside a transaction."""

from __future__ import annotations

import time
from typing import Final

import msgspec
from sqlalchemy import and_, delete, exists, or_, select
from sqlalchemy.orm import Session

from fleet.errors import IdentityError
from fleet.identity.enrolment import Enrolment, is_tag
from fleet.registry.identities.api_keys import delete_keys, revoke_keys
from fleet.registry.identities.certificates import revoke_certificates
from fleet.registry.identities.devices import is_device
from fleet.registry.identities.lifecycle import (
    LIMITED_BY_CERTIFICATE,
    IdentityChange,
    IdentityState,
    next_state,
    state_at,
)
from fleet.registry.identities.tokens import delete_tokens
from fleet.registry.models import (
    AllowedTarget,
    ConfigChange,
    IdentityRecord,
    StatusRecord,
    TagRecord,
    WorkerRecord,
)

ENDED: Final = (IdentityState.REVOKED, IdentityState.DELETED)
DEVICE_SCOPE: Final = "device"  # of `fleet.registry.settings.Scope`, which is above this room


def enroll(db: Session, enrolment: Enrolment, *, replace: bool) -> IdentityRecord:
    """Add or change an identity, which is pending until it has a certificate.

    Its earlier certificates and tokens become invalid, and with `replace` its API keys. An identity
    that is replaced in the same role keeps its group, its tags and its targets, each unless
    `enrolment` has new ones.

    Raises:
        IdentityError: it is active or suspended (unless `replace`), its name is a group's, or its
            group's is a name; apps are allowed a former group of its name; a target is neither a
            device nor a group nor a tag.
    """
    now = time.time()
    existing = db.get(IdentityRecord, enrolment.name, with_for_update=True)
    state = _next_state(existing, now, replace=replace) if existing else IdentityState.PENDING
    if existing and replace:
        revoke_keys(db, existing.name, now)
    for target in enrolment.targets:
        check_target(db, target)
    if existing and replace:
        enrolment = _keep_details(db, existing, enrolment)
    _check_names(db, enrolment.name, enrolment.group)
    if not existing or existing.state == IdentityState.DELETED:
        _check_not_allowed(db, enrolment.name)
    record = existing or IdentityRecord(name=enrolment.name, created_at=now)
    record.role = enrolment.role.value
    record.group = enrolment.group
    record.state = state
    record.fingerprint = ""
    record.not_after = 0.0
    db.add(record)
    db.flush()
    if existing:
        revoke_certificates(db, existing.name, now)
        delete_tokens(db, existing.name)
    _replace_details(db, enrolment)
    return record


def _next_state(record: IdentityRecord, now: float, *, replace: bool) -> IdentityState:
    state = state_at(record.state, record.not_after, now)
    if state in LIMITED_BY_CERTIFICATE:
        if not replace:
            raise IdentityError(
                f"{record.name!r} is enrolled already, as {record.role}; "
                "choose another name, replace it with --force, "
                "or leave the enrolled names of a file out with --new-only"
            )
        state = next_state(record.name, state, IdentityChange.REVOKE)
    return next_state(record.name, state, IdentityChange.ENROLL)


def _keep_details(db: Session, existing: IdentityRecord, enrolment: Enrolment) -> Enrolment:
    """Return the enrolment with those details of `existing` that it does not have itself."""
    if existing.role != enrolment.role or existing.state in ENDED:
        return enrolment
    name = existing.name
    targets = select(AllowedTarget.target).where(AllowedTarget.app == name)
    tags = db.scalars(select(TagRecord).where(TagRecord.device == name))
    return msgspec.structs.replace(
        enrolment,
        group=enrolment.group or existing.group,
        tags=enrolment.tags or {tag.key: tag.value for tag in tags},
        targets=enrolment.targets or tuple(db.scalars(targets)),
    )


def _replace_details(db: Session, enrolment: Enrolment) -> None:
    name = enrolment.name
    db.execute(delete(AllowedTarget).where(AllowedTarget.app == name))
    db.execute(delete(TagRecord).where(TagRecord.device == name))
    targets = dict.fromkeys(enrolment.targets)
    db.add_all(AllowedTarget(app=name, target=target) for target in targets)
    db.add_all(
        TagRecord(device=name, key=key, value=value) for key, value in enrolment.tags.items()
    )


def _check_names(db: Session, name: str, group: str | None) -> None:
    """Refuse a name that is an identity's and a group's: a grant would be ambiguous."""
    if db.scalar(select(exists().where(IdentityRecord.group == name))):
        raise IdentityError(f"{name!r} is the name of a group; choose another")
    check_group(db, name, group)


def _check_not_allowed(db: Session, name: str) -> None:
    """Refuse a new name that apps may prompt, as a group's: the right was not for this identity."""
    apps = db.scalars(select(AllowedTarget.app).where(AllowedTarget.target == name)).all()
    if apps:
        raise IdentityError(
            f"{name!r} was a group, and is still allowed to {', '.join(sorted(apps))}; withdraw it "
            f"with 'fleet disallow APP {name}', or choose another name"
        )


def check_group(db: Session, name: str, group: str | None) -> None:
    """Raise IdentityError when the group of `name` is the name of an identity."""
    if group is None:
        return
    is_named = and_(IdentityRecord.name == group, IdentityRecord.state != IdentityState.DELETED)
    if group == name or db.scalar(select(exists().where(is_named))):
        raise IdentityError(f"group {group!r} is the name of an identity; choose another")


def delete_details(db: Session, record: IdentityRecord) -> None:
    """Delete everything about an identity but its name, its certificates and its statistics."""
    name = record.name
    record.group = None
    delete_tokens(db, name)
    delete_keys(db, name)
    is_right = or_(AllowedTarget.app == name, AllowedTarget.target == name)
    db.execute(delete(AllowedTarget).where(is_right))
    db.execute(delete(TagRecord).where(TagRecord.device == name))
    is_own = and_(ConfigChange.scope == DEVICE_SCOPE, ConfigChange.target == name)
    db.execute(delete(ConfigChange).where(is_own))
    db.execute(delete(StatusRecord).where(StatusRecord.device == name))
    db.execute(delete(WorkerRecord).where(WorkerRecord.worker == name))


def check_target(db: Session, target: str) -> None:
    """Raise IdentityError unless `target` is a device, a group, or a tag ``key=value``."""
    if is_tag(target):
        return
    is_group = and_(is_device(), IdentityRecord.group == target)
    if not db.scalar(select(exists().where(or_(is_device(target), is_group)))):
        raise IdentityError(
            f"cannot allow {target[:80]!r}: it is no enrolled device, no group and no tag like "
            "floor=1; enrol it first"
        )
