"""What everybody may do, in three questions, however many there are."""

from __future__ import annotations

from collections import defaultdict

from sqlalchemy import select
from sqlalchemy.orm import Session

from fleet.protocol.access import Grants, Role
from fleet.registry.identities.states import IdentityState, state_at
from fleet.registry.models import AllowedTarget, IdentityRecord, TagRecord


def all_grants(db: Session, now: float) -> list[Grants]:
    """The rights of who is active, by name; those that `Registry.grants` gives one by one."""
    identities = db.scalars(select(IdentityRecord).order_by(IdentityRecord.name)).all()
    devices = _devices_by_word(
        db, [identity for identity in identities if identity.role == Role.DEVICE]
    )
    targets: defaultdict[str, set[str]] = defaultdict(set)
    for app, word in db.execute(select(AllowedTarget.app, AllowedTarget.target)):
        for device in devices[word]:
            targets[app].add(device)
            targets[device].add(app)
    return [
        Grants(Role(identity.role), identity.name, tuple(sorted(targets[identity.name])))
        for identity in identities
        if state_at(identity.state, identity.not_after, now) is IdentityState.ACTIVE
    ]


def _devices_by_word(db: Session, devices: list[IdentityRecord]) -> defaultdict[str, list[str]]:
    """The devices that each word of an ``--allow`` means: a name, a group, or a tag ``key=value``."""
    by_word: defaultdict[str, list[str]] = defaultdict(list)
    for device in devices:
        by_word[device.name].append(device.name)
        if device.group:
            by_word[device.group].append(device.name)
    for tag in db.scalars(select(TagRecord)):
        by_word[f"{tag.key}={tag.value}"].append(tag.device)
    return by_word
