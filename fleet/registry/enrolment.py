"""Who is enrolled, and for what: checked and written in one transaction."""

from __future__ import annotations

import time
from collections.abc import Sequence

from sqlalchemy import and_, delete, exists, or_, select
from sqlalchemy.orm import Session

from fleet import topics
from fleet.access import Role
from fleet.errors import IdentityError
from fleet.registry.devices import is_device
from fleet.registry.models import AllowedTarget, IdentityRecord
from fleet.registry.states import State


def add_identity(
    db: Session,
    name: str,
    role: Role,
    group: str | None,
    targets: Sequence[str],
    *,
    fingerprint: str,
    not_after: float,
    replace: bool,
) -> None:
    """Raises IdentityError; see `Registry.add_identity`."""
    known = db.get(IdentityRecord, name)
    if known and not replace:
        raise IdentityError(f"{name!r} is enrolled already, as {known.role}; choose another name")
    _check_names(db, name, group)
    for target in targets:
        check_target(db, target)
    record = known or IdentityRecord(name=name, created_at=time.time())
    record.role, record.group, record.state = role.value, group, State.ACTIVE
    record.fingerprint, record.not_after = fingerprint, not_after
    db.add(record)
    db.flush()
    db.execute(delete(AllowedTarget).where(AllowedTarget.app == name))
    db.add_all(AllowedTarget(app=name, target=target) for target in dict.fromkeys(targets))


def _check_names(db: Session, name: str, group: str | None) -> None:
    """A name is an identity's or a group's, never both: else allowing one would allow the other."""
    if db.scalar(select(exists().where(IdentityRecord.group == name))):
        raise IdentityError(f"{name!r} is the name of a group; choose another")
    if group == name or (group is not None and db.get(IdentityRecord, group) is not None):
        raise IdentityError(f"group {group!r} is the name of an identity; choose another")


def check_target(db: Session, target: str) -> None:
    """Raises IdentityError unless `target` is a device, a group of devices, or a tag ``key=value``."""
    key, is_tag, value = target.partition("=")
    if is_tag and topics.NAME.fullmatch(key) and topics.NAME.fullmatch(value):
        return
    is_group = and_(is_device(), IdentityRecord.group == target)
    if not db.scalar(select(exists().where(or_(is_device(target), is_group)))):
        raise IdentityError(
            f"cannot allow {target[:80]!r}: it is no enrolled device, no group and no tag like floor=1; enrol it first"
        )
