"""Desired configuration: settings of all devices, of a group, and of one device; each change is a version."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable
from enum import StrEnum
from typing import Final, NamedTuple

import msgspec
from sqlalchemy import exists, func, select
from sqlalchemy.orm import Session

from fleet.errors import ConfigError
from fleet.protocol.desired_config import DesiredConfig, Settings, merge
from fleet.registry.audit import audit
from fleet.registry.database import CONFIG_LOCK, take_turns
from fleet.registry.identities.devices import check_device, is_device
from fleet.registry.models import ConfigChange, IdentityRecord


class Scope(StrEnum):
    """Whose settings; a narrower scope decides before a wider one."""

    ALL = "all"
    GROUP = "group"
    DEVICE = "device"


class Target(NamedTuple):
    """A scope and its name: a device's, a group's, or "" for all."""

    scope: Scope
    name: str = ""

    def __str__(self) -> str:
        return self.scope if self.scope is Scope.ALL else f"{self.scope}:{self.name}"


NOTHING: Final = 0, Settings()


def current_settings(db: Session, target: Target) -> Settings:
    """What was said last for `target` itself, without the wider scopes."""
    query = (
        select(ConfigChange.settings)
        .where(ConfigChange.scope == target.scope, ConfigChange.target == target.name)
        .order_by(ConfigChange.id.desc())
        .limit(1)
    )
    return msgspec.convert(db.scalar(query) or {}, Settings)


def change_settings(
    db: Session, actor: str, target: Target, change: Callable[[Settings], Settings]
) -> int:
    """Puts ``change(settings)`` in the place of all that is said for `target`; gives the new version.

    Raises:
        UnknownDeviceError: nobody enrolled the device.
        ConfigError: no device is in the group.
    """
    _check_target(db, target)
    take_turns(db, CONFIG_LOCK)
    values = msgspec.to_builtins(change(current_settings(db, target)))
    made = ConfigChange(
        scope=target.scope, target=target.name, settings=values, changed_at=time.time()
    )
    db.add(made)
    db.flush()
    audit(db, actor, "config", str(target), version=made.id, settings=values)
    return made.id


def change_scope(
    db: Session,
    actor: str,
    scope: Scope,
    names: Collection[str],
    change: Callable[[str, Settings], Settings],
) -> None:
    """Puts ``change(name, settings)`` in the place of the settings of many at once; who keeps them gets no version."""
    take_turns(db, CONFIG_LOCK)
    said = _said(db)
    changes = {}
    for name in names:
        settings = said.get(Target(scope, name), NOTHING)[1]
        if (changed := change(name, settings)) != settings:
            values = msgspec.to_builtins(changed)
            changes[name] = ConfigChange(
                scope=scope, target=name, settings=values, changed_at=time.time()
            )
    db.add_all(changes.values())
    db.flush()
    for name, made in changes.items():
        audit(
            db, actor, "config", str(Target(scope, name)), version=made.id, settings=made.settings
        )


def desired_configs(db: Session, devices: Iterable[str] | None = None) -> dict[str, DesiredConfig]:
    """What is wanted of each device, or of `devices`: a version of 0 where nothing was ever said."""
    return {
        name: DesiredConfig(
            max(version for version, _ in scopes), merge(*(each for _, each in scopes))
        )
        for name, scopes in _scopes(db, devices).items()
    }


def wider_settings(db: Session, devices: Iterable[str]) -> dict[str, Settings]:
    """What is said for each of `devices` by the scopes beyond itself."""
    return {
        name: merge(*(each for _, each in scopes[:-1]))
        for name, scopes in _scopes(db, devices).items()
    }


def _scopes(db: Session, devices: Iterable[str] | None) -> dict[str, list[tuple[int, Settings]]]:
    """What was said of each device, by name: for all, for its group, and for itself."""
    said = _said(db)
    query = (
        select(IdentityRecord.name, IdentityRecord.group)
        .where(is_device())
        .order_by(IdentityRecord.name)
    )
    if devices is not None:
        query = query.where(IdentityRecord.name.in_(list(devices)))
    return {
        name: [
            said.get(Target(Scope.ALL), NOTHING),
            said.get(Target(Scope.GROUP, group), NOTHING) if group else NOTHING,
            said.get(Target(Scope.DEVICE, name), NOTHING),
        ]
        for name, group in db.execute(query)
    }


def _said(db: Session) -> dict[Target, tuple[int, Settings]]:
    """What was said last for every target, with its version."""
    newest = select(func.max(ConfigChange.id)).group_by(ConfigChange.scope, ConfigChange.target)
    return {
        Target(Scope(row.scope), row.target): (row.id, msgspec.convert(row.settings, Settings))
        for row in db.scalars(select(ConfigChange).where(ConfigChange.id.in_(newest)))
    }


def _check_target(db: Session, target: Target) -> None:
    if target.scope is Scope.DEVICE:
        check_device(db, target.name)
    elif target.scope is Scope.GROUP and not db.scalar(
        select(exists().where(is_device(), IdentityRecord.group == target.name))
    ):
        raise ConfigError(f"no device is in the group {target.name[:80]!r}; see 'fleet devices'")
