"""Grants: the devices that an app may prompt, by a name, a group, or a tag ``key=value``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from sqlalchemy import ColumnElement, Select, delete, or_, select
from sqlalchemy.orm import Session

from fleet.errors import IdentityError
from fleet.protocol.access import Grants, Role
from fleet.registry.audit import audit
from fleet.registry.identities.devices import check_device, is_device
from fleet.registry.identities.enrolment import check_target
from fleet.registry.identities.lifecycle import IdentityState, state_at
from fleet.registry.models import AllowedTarget, IdentityRecord, TagRecord

FEW: Final = 16
"""Names for which a look-up of each costs less than one of all."""


def grants_of(db: Session, name: str, now: float) -> Grants | None:
    """Return the grants of `name`; None unless it is active."""
    record = db.get(IdentityRecord, name)
    if record is None or not is_active(record, now):
        return None
    return Grants(Role(record.role), name, _targets_of(db, record))


def _targets_of(db: Session, identity: IdentityRecord) -> tuple[str, ...]:
    """Return the devices that an app may prompt, or the apps that may prompt a device."""
    match Role(identity.role):
        case Role.APP:
            return tuple(db.scalars(_devices_of(identity.name)))
        case Role.DEVICE:
            return tuple(db.scalars(_apps_of(identity)))
    return ()


def all_grants(db: Session, now: float) -> list[Grants]:
    """Return the grants of every active identity, by name, from three queries in all."""
    identities = db.scalars(select(IdentityRecord).order_by(IdentityRecord.name)).all()
    targets: defaultdict[str, set[str]] = defaultdict(set)
    for app, devices in devices_by_app(db, identities).items():
        targets[app] |= devices
        for device in devices:
            targets[device].add(app)
    return [
        Grants(Role(identity.role), identity.name, tuple(sorted(targets[identity.name])))
        for identity in identities
        if is_active(identity, now)
    ]


def grants_of_names(db: Session, names: Sequence[str], now: float) -> list[Grants]:
    """Return the grants of those of `names` that are active, each from few queries."""
    if len(names) > FEW:
        wanted = set(names)
        return [each for each in all_grants(db, now) if each.name in wanted]
    return [each for name in names if (each := grants_of(db, name, now))]


def is_active(identity: IdentityRecord, now: float) -> bool:
    """Whether an identity has its rights now."""
    return state_at(identity.state, identity.not_after, now) is IdentityState.ACTIVE


def devices_by_app(db: Session, identities: Sequence[IdentityRecord]) -> dict[str, set[str]]:
    """Return those of `identities` that each app may prompt, of every app that has targets."""
    devices = _devices_by_target(db, identities)
    return {
        app: {device for target in allowed for device in devices[target]}
        for app, allowed in targets_by_app(db).items()
    }


def _devices_by_target(
    db: Session, identities: Sequence[IdentityRecord]
) -> defaultdict[str, list[str]]:
    """Return the devices that each target of ``--allow`` covers."""
    names: defaultdict[str, list[str]] = defaultdict(list)
    for device in identities:
        if device.role != Role.DEVICE:
            continue
        names[device.name].append(device.name)
        if device.group:
            names[device.group].append(device.name)
    for tag in db.scalars(select(TagRecord)):
        names[f"{tag.key}={tag.value}"].append(tag.device)
    return names


def allow(db: Session, actor: str, app: str, targets: Sequence[str]) -> None:
    """Let an app prompt more devices.

    Raises:
        IdentityError: `app` is no app, or a target is neither a device nor a group nor a tag.
    """
    check_app(db, app)
    for target in targets:
        check_target(db, target)
    allowed = set(_allowed_targets(db, app))
    new = [target for target in dict.fromkeys(targets) if target not in allowed]
    db.add_all(AllowedTarget(app=app, target=target) for target in new)
    audit(db, actor, "allow", app, targets=list(targets))


def disallow(db: Session, actor: str, app: str, targets: Sequence[str]) -> None:
    """Withdraw targets that an app was allowed.

    Raises:
        IdentityError: `app` is no app, or was not allowed one of them.
    """
    check_app(db, app)
    allowed = _allowed_targets(db, app)
    if unknown := [target for target in targets if target not in allowed]:
        raise IdentityError(
            f"{app!r} was not allowed {', '.join(unknown)[:80]}; "
            f"it was allowed {', '.join(allowed) or 'nothing'}"
        )
    db.execute(
        delete(AllowedTarget).where(AllowedTarget.app == app, AllowedTarget.target.in_(targets))
    )
    audit(db, actor, "disallow", app, targets=list(targets))


def change_tags(
    db: Session, actor: str, device: str, tags: Mapping[str, str], remove: Iterable[str]
) -> None:
    """Set tags of a device, and remove those whose keys are in `remove`.

    Raises:
        UnknownDeviceError: it is not enrolled.
        IdentityError: it does not have a tag that is to be removed.
    """
    check_device(db, device)
    _check_tags(db, device, remove)
    keys = sorted({*remove, *tags})
    db.execute(delete(TagRecord).where(TagRecord.device == device, TagRecord.key.in_(keys)))
    db.add_all(TagRecord(device=device, key=key, value=value) for key, value in tags.items())
    removed = [key for key in keys if key not in tags]
    audit(db, actor, "tag", device, tags=dict(tags), removed=removed)


def _check_tags(db: Session, device: str, keys: Iterable[str]) -> None:
    tags = tags_by_device(db, [device]).get(device, {})
    if unknown := [key for key in keys if key not in tags]:
        raise IdentityError(
            f"{device!r} has no tag {', '.join(unknown)[:80]}; it has {', '.join(tags) or 'none'}"
        )


def tags_by_device(db: Session, devices: Sequence[str] | None = None) -> dict[str, dict[str, str]]:
    """Return the tags, by key, of every device that has some, or of some devices."""
    query = select(TagRecord).order_by(TagRecord.device, TagRecord.key)
    if devices is not None:
        query = query.where(TagRecord.device.in_(devices))
    tags: dict[str, dict[str, str]] = {}
    for tag in db.scalars(query):
        tags.setdefault(tag.device, {})[tag.key] = tag.value
    return tags


def targets_by_app(db: Session) -> dict[str, list[str]]:
    """Return the targets that every app was allowed, in order."""
    targets: dict[str, list[str]] = {}
    query = select(AllowedTarget.app, AllowedTarget.target).order_by(AllowedTarget.target)
    for app, target in db.execute(query):
        targets.setdefault(app, []).append(target)
    return targets


def _allowed_targets(db: Session, app: str) -> Sequence[str]:
    query = select(AllowedTarget.target).where(AllowedTarget.app == app)
    return db.scalars(query.order_by(AllowedTarget.target)).all()


def check_app(db: Session, app: str) -> None:
    """Raise IdentityError unless `app` is the name of an app."""
    identity = db.get(IdentityRecord, app)
    if identity is not None and identity.state == IdentityState.DELETED:
        identity = None
    if identity is None or identity.role != Role.APP:
        enrol = f"enrol it with 'fleet enroll {app[:80]} --role app'"
        advice = f"it is {Role(identity.role).with_article}" if identity else enrol
        raise IdentityError(f"expected the name of an app, got {app[:80]!r}; {advice}")


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
    names = [device.name, device.group] if device.group else [device.name]
    is_target = or_(AllowedTarget.target.in_(names), AllowedTarget.target.in_(tags))
    return select(AllowedTarget.app).where(is_target).distinct().order_by("app")
