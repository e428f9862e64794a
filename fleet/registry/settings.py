"""Desired settings of all devices, of a group, and of one device; each change is a version."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Final, NamedTuple

import msgspec
from msgspec.structs import replace
from sqlalchemy import exists, func, select
from sqlalchemy.orm import Session

from fleet.errors import ConfigError
from fleet.protocol.desired_config import (
    DesiredConfig,
    Settings,
    merge_scopes,
    parse_settings,
)
from fleet.registry.audit import audit
from fleet.registry.database import CONFIG_LOCK, acquire_lock
from fleet.registry.identities.devices import check_device, is_device
from fleet.registry.models import ConfigChange, IdentityRecord, StatusRecord
from fleet.registry.targets import Scope, Target
from fleet.registry.transactions import Repository


class VersionedSettings(NamedTuple):
    """The newest settings of one target, and their version."""

    version: int
    settings: Settings


NO_SETTINGS: Final = VersionedSettings(0, Settings())


class DesiredStateRepository(Repository):
    """The settings that devices shall follow. Each method is one transaction."""

    def settings(self, target: Target) -> Settings:
        """Return the newest settings of `target` itself, without the wider scopes."""
        with self._transactions.reading() as db:
            return newest_settings(db, target)

    def change_settings(
        self,
        target: Target,
        change: Callable[[Settings], Settings],
        *,
        if_version: int | None = None,
    ) -> int:
        """Replace a target's settings by ``change(settings)``; return the new version.

        Raises:
            UnknownDeviceError: the device is not enrolled.
            ConfigError: no device is in the group, or the settings have another version than
                `if_version`.
        """

        def work(db: Session) -> int:
            check_settings_target(db, target)
            acquire_lock(db, CONFIG_LOCK)
            if if_version is not None:
                _check_version(db, target, if_version)
            return _add_change(db, self.actor, target, change(newest_settings(db, target)))

        return self._transactions.write(work)

    def roll_out_software(self, target: Target, version: str) -> int:
        """Make `version` the software of a target, instead of that of narrower scopes within it.

        Return the new version of the target's settings, which is new also when they were the same.

        Raises:
            UnknownDeviceError: the device is not enrolled.
            ConfigError: no device is in the group.
        """

        def work(db: Session) -> int:
            check_settings_target(db, target)
            acquire_lock(db, CONFIG_LOCK)
            for narrower, newest in _settings_by_target(db).items():
                if newest.settings.software and _is_narrower(db, narrower, target):
                    settings = replace(newest.settings, software=None)
                    _add_change(db, self.actor, narrower, settings)
            settings = replace(newest_settings(db, target), software=version)
            return _add_change(db, self.actor, target, settings)

        return self._transactions.write(work)

    def scopes(self, device: str) -> dict[Target, VersionedSettings]:
        """Return the settings that apply to a device by their targets, the widest first.

        Raises:
            UnknownDeviceError: it is not enrolled.
        """
        with self._transactions.reading() as db:
            check_device(db, device)
            group = db.scalar(select(IdentityRecord.group).where(IdentityRecord.name == device))
            targets = [Target(Scope.ALL), Target(Scope.DEVICE, device)]
            if group:
                targets.insert(1, Target(Scope.GROUP, group))
            newest = _settings_by_target(db)
            return {target: newest.get(target, NO_SETTINGS) for target in targets}

    def newest(self, target: Target) -> VersionedSettings:
        """Return the newest settings of `target` itself, and their version."""
        with self._transactions.reading() as db:
            return _settings_by_target(db).get(target, NO_SETTINGS)

    def lags(self, group: str | None = None) -> tuple[dict[str, int], int]:
        """Return the desired versions of the devices that do not follow, and the number compared.

        Such a device has another version, or reports a problem. With `group` only its devices are
        compared.
        """
        query = (
            select(
                IdentityRecord.name,
                IdentityRecord.group,
                StatusRecord.config_version,
                StatusRecord.config_error.is_not(None),
            )
            .outerjoin(StatusRecord, StatusRecord.device == IdentityRecord.name)
            .where(is_device())
            .order_by(IdentityRecord.name)
        )
        if group is not None:
            query = query.where(IdentityRecord.group == group)
        with self._transactions.reading() as db:
            versions = newest_versions(db)
            rows = db.execute(query).all()
        desired = {name: wanted_version(versions, name, own_group) for name, own_group, *_ in rows}
        behind = [name for name, _, version, bad in rows if bad or desired[name] != (version or 0)]
        return {name: desired[name] for name in behind}, len(rows)

    def configs(self, devices: Iterable[str] | None = None) -> dict[str, DesiredConfig]:
        """Return the desired configuration of each device, or of `devices`.

        A configuration without settings has version 0.
        """
        with self._transactions.reading() as db:
            return desired_configs(db, devices)


def change_scope(
    db: Session,
    actor: str,
    scope: Scope,
    names: Collection[str],
    change: Callable[[str, Settings], Settings],
) -> None:
    """Replace the settings of many targets of a scope by ``change(name, settings)``.

    A target whose settings stay the same gets no new version.
    """
    acquire_lock(db, CONFIG_LOCK)
    newest = _settings_by_target(db)
    records = {}
    for name in names:
        settings = newest.get(Target(scope, name), NO_SETTINGS).settings
        changed = change(name, settings)
        if changed != settings:
            records[name] = ConfigChange(
                scope=scope,
                target=name,
                settings=msgspec.to_builtins(changed),
                changed_at=time.time(),
            )
    db.add_all(records.values())
    db.flush()
    for name, record in records.items():
        subject = str(Target(scope, name))
        audit(db, actor, "config", subject, version=record.id, settings=record.settings)


def desired_configs(db: Session, devices: Iterable[str] | None = None) -> dict[str, DesiredConfig]:
    """Return the desired configuration of each device, or of `devices`."""
    return {
        name: DesiredConfig.of(
            max(each.version for each in scopes), merge_scopes(*(each.settings for each in scopes))
        )
        for name, scopes in _scopes(db, devices).items()
    }


def wider_settings(db: Session, devices: Iterable[str]) -> dict[str, Settings]:
    """Return the settings of each of `devices` from the scopes wider than itself."""
    return {
        name: merge_scopes(*(each.settings for each in scopes[:-1]))
        for name, scopes in _scopes(db, devices).items()
    }


def newest_settings(db: Session, target: Target) -> Settings:
    """Return the newest settings of `target` itself, without the wider scopes."""
    query = (
        select(ConfigChange.settings)
        .where(ConfigChange.scope == target.scope, ConfigChange.target == target.name)
        .order_by(ConfigChange.id.desc())
        .limit(1)
    )
    return msgspec.convert(db.scalar(query) or {}, Settings)


def _scopes(db: Session, devices: Iterable[str] | None) -> dict[str, list[VersionedSettings]]:
    """Return the settings that apply to each device: for all, for its group, and for itself."""
    newest = _settings_by_target(db)
    query = (
        select(IdentityRecord.name, IdentityRecord.group)
        .where(is_device())
        .order_by(IdentityRecord.name)
    )
    if devices is not None:
        query = query.where(IdentityRecord.name.in_(list(devices)))
    return {
        name: [
            newest.get(Target(Scope.ALL), NO_SETTINGS),
            newest.get(Target(Scope.GROUP, group), NO_SETTINGS) if group else NO_SETTINGS,
            newest.get(Target(Scope.DEVICE, name), NO_SETTINGS),
        ]
        for name, group in db.execute(query)
    }


def _settings_by_target(db: Session) -> dict[Target, VersionedSettings]:
    newest = select(func.max(ConfigChange.id)).group_by(ConfigChange.scope, ConfigChange.target)
    return {
        Target(Scope(row.scope), row.target): VersionedSettings(
            row.id, msgspec.convert(row.settings, Settings)
        )
        for row in db.scalars(select(ConfigChange).where(ConfigChange.id.in_(newest)))
    }


def targets_with_thresholds(db: Session) -> set[Target]:
    """Return the targets whose settings have other thresholds than those of a bundle."""
    return {
        target
        for target, (_, settings) in _settings_by_target(db).items()
        if settings.threshold is not None or settings.thresholds is not None
    }


def newest_versions(db: Session) -> dict[tuple[str, str], int]:
    """Return the version of the settings of each scope and target that has some."""
    row = ConfigChange
    newest = select(row.scope, row.target, func.max(row.id)).group_by(row.scope, row.target)
    return {(scope, target): version for scope, target, version in db.execute(newest)}


def wanted_version(versions: Mapping[tuple[str, str], int], device: str, group: str | None) -> int:
    """Return the version of a device's desired settings from the `newest_versions`."""
    return max(
        versions.get((Scope.ALL, ""), 0),
        versions.get((Scope.GROUP, group or ""), 0),
        versions.get((Scope.DEVICE, device), 0),
    )


def _add_change(db: Session, actor: str, target: Target, settings: Settings) -> int:
    """Store the settings of a target; return their version. Raises ConfigError.

    `Settings` that code has made are checked here: others could not be read again.
    """
    values = msgspec.to_builtins(settings)
    parse_settings(values)
    record = ConfigChange(
        scope=target.scope, target=target.name, settings=values, changed_at=time.time()
    )
    db.add(record)
    db.flush()
    audit(db, actor, "config", str(target), version=record.id, settings=record.settings)
    return record.id


def _check_version(db: Session, target: Target, expected: int) -> None:
    """Raise ConfigError when another change was made after the `expected` version."""
    version = _settings_by_target(db).get(target, NO_SETTINGS).version
    if version != expected:
        raise ConfigError(
            f"the settings of {target} have version {version}, expected {expected}: another "
            "operator has changed them; read them again, and repeat the change"
        )


def _is_narrower(db: Session, narrower: Target, target: Target) -> bool:
    """Whether a target is one of the devices or groups within another."""
    if target.scope is Scope.ALL:
        return narrower.scope is not Scope.ALL
    if target.scope is Scope.DEVICE or narrower.scope is not Scope.DEVICE:
        return False
    record = db.get(IdentityRecord, narrower.name)
    return record is not None and record.group == target.name


def check_settings_target(db: Session, target: Target) -> None:
    """Raise UnknownDeviceError or ConfigError unless a target has a device."""
    if target.scope is Scope.DEVICE:
        check_device(db, target.name)
    elif target.scope is Scope.GROUP and not db.scalar(
        select(exists().where(is_device(), IdentityRecord.group == target.name))
    ):
        raise ConfigError(f"no device is in the group {target.name[:80]!r}; see 'fleet devices'")
