"""Which apps may ask which devices: allowed by a device's name, its group, or a tag ``key=value``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Select, delete, or_, select
from sqlalchemy.orm import Session

from fleet.errors import IdentityError
from fleet.protocol.access import Role
from fleet.registry.audit import audit
from fleet.registry.identities.devices import check_device, is_device
from fleet.registry.identities.enrolment import check_target
from fleet.registry.models import AllowedTarget, IdentityRecord, TagRecord


def targets_of(db: Session, identity: IdentityRecord) -> tuple[str, ...]:
    """The devices that an app was allowed, the apps that were allowed a device; none of whoever else."""
    match Role(identity.role):
        case Role.APP:
            return tuple(db.scalars(_devices_of(identity.name)))
        case Role.DEVICE:
            return tuple(db.scalars(_apps_of(identity)))
    return ()


def allow(db: Session, actor: str, app: str, targets: Sequence[str]) -> None:
    """Raises IdentityError; see `Registry.allow`."""
    _check_app(db, app)
    for target in targets:
        check_target(db, target)
    known = set(_targets(db, app))
    db.add_all(
        AllowedTarget(app=app, target=target)
        for target in dict.fromkeys(targets)
        if target not in known
    )
    audit(db, actor, "allow", app, targets=list(targets))


def disallow(db: Session, actor: str, app: str, targets: Sequence[str]) -> None:
    """Raises IdentityError; see `Registry.disallow`."""
    _check_app(db, app)
    known = _targets(db, app)
    if unknown := [target for target in targets if target not in known]:
        raise IdentityError(
            f"{app!r} was not allowed {', '.join(unknown)[:80]}; it was allowed {', '.join(known) or 'nothing'}"
        )
    db.execute(
        delete(AllowedTarget).where(AllowedTarget.app == app, AllowedTarget.target.in_(targets))
    )
    audit(db, actor, "disallow", app, targets=list(targets))


def change_tags(
    db: Session, actor: str, device: str, tags: Mapping[str, str], remove: Iterable[str]
) -> None:
    """Raises UnknownDeviceError; see `Registry.tag`."""
    check_device(db, device)
    gone = sorted({*remove, *tags})
    db.execute(delete(TagRecord).where(TagRecord.device == device, TagRecord.key.in_(gone)))
    db.add_all(TagRecord(device=device, key=key, value=value) for key, value in tags.items())
    audit(
        db, actor, "tag", device, tags=dict(tags), removed=[key for key in gone if key not in tags]
    )


def all_tags(db: Session) -> dict[str, dict[str, str]]:
    """The tags of every device that has some, in order."""
    tags: dict[str, dict[str, str]] = {}
    for tag in db.scalars(select(TagRecord).order_by(TagRecord.device, TagRecord.key)):
        tags.setdefault(tag.device, {})[tag.key] = tag.value
    return tags


def _targets(db: Session, app: str) -> Sequence[str]:
    query = (
        select(AllowedTarget.target).where(AllowedTarget.app == app).order_by(AllowedTarget.target)
    )
    return db.scalars(query).all()


def _check_app(db: Session, app: str) -> None:
    identity = db.get(IdentityRecord, app)
    if identity is None or identity.role != Role.APP:
        known = (
            f"it is a {identity.role}"
            if identity
            else f"enrol it with 'fleet enroll {app[:80]} --role app'"
        )
        raise IdentityError(f"expected the name of an app, got {app[:80]!r}; {known}")


def _tag() -> ColumnElement[str]:
    return TagRecord.key + "=" + TagRecord.value


def _devices_of(app: str) -> Select[Any]:
    allowed = select(AllowedTarget.target).where(AllowedTarget.app == app)
    tagged = select(TagRecord.device).where(_tag().in_(allowed))
    name = IdentityRecord.name
    group = IdentityRecord.group
    return (
        select(name)
        .where(is_device(), or_(name.in_(allowed), group.in_(allowed), name.in_(tagged)))
        .order_by(name)
    )


def _apps_of(device: IdentityRecord) -> Select[Any]:
    tags = select(_tag()).where(TagRecord.device == device.name)
    names = AllowedTarget.target.in_([device.name] + ([device.group] if device.group else []))
    return (
        select(AllowedTarget.app)
        .where(or_(names, AllowedTarget.target.in_(tags)))
        .distinct()
        .order_by("app")
    )
