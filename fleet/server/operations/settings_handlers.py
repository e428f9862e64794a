"""Operations on the desired settings of all devices, of a group, and of one device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from msgspec.structs import replace

from edge_agent.config import CONFIG_FILE, AgentConfig
from fleet.errors import ConfigError
from fleet.operator_api.settings_operations import (
    LIST_CONFIG_LAGS,
    SET_SETTINGS,
    SHOW_SETTINGS,
    UNSET_SETTINGS,
    ChangedSettings,
    ConfigLag,
    ConfigLagList,
    LagQuery,
    ScopeSettings,
    SettingsChange,
    SettingsRemoval,
    SettingsTarget,
    TargetSettings,
)
from fleet.protocol.desired_config import (
    Settings,
    is_setting,
    known_settings,
    merge_scopes,
    parse_settings,
)
from fleet.registry.results import DeviceRow
from fleet.registry.settings import VersionedSettings
from fleet.registry.targets import Scope, Target
from fleet.server.operations.context import Handlers, OperationContext
from fleet.server.operations.pages import page_of


def _show_settings(context: OperationContext, request: SettingsTarget) -> TargetSettings:
    """Return the settings of a target.

    Raises:
        ConfigError, TopicError, UnknownDeviceError: there is no such target.
    """
    target = Target.parse(request.target)
    desired_state = context.registry.desired_state
    if target.scope is Scope.DEVICE:
        scopes = desired_state.scopes(target.name)
    else:
        scopes = {target: desired_state.newest(target)}
    return TargetSettings(
        target=str(target),
        version=max(each.version for each in scopes.values()),
        settings=merge_scopes(*(each.settings for each in scopes.values())),
        scopes=[_scope_settings(*each) for each in scopes.items()],
    )


def _scope_settings(target: Target, newest: VersionedSettings) -> ScopeSettings:
    return ScopeSettings(target=str(target), version=newest.version, settings=newest.settings)


def _set_settings(context: OperationContext, change: SettingsChange) -> ChangedSettings:
    """Set values of a target.

    Raises:
        ConfigError: there is no such setting, or a value is not usable.
        RolloutError: the bundle is unknown.
        TopicError, UnknownDeviceError: there is no such target.
    """
    target = Target.parse(change.target)
    values = _checked_values(change.settings)
    if isinstance(bundle := values.get("bundle"), str):  # also a name, or the beginning of an id
        values["bundle"] = context.registry.rollouts.find_bundle(bundle)
    changes = parse_settings(values)
    return _change(
        context, target, lambda settings: merge_scopes(settings, changes), change.if_version
    )


def _checked_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values to set. Raises ConfigError for null, and for settings of one device."""
    if not values:
        raise ConfigError(f"nothing to set: {known_settings()}")
    for key, value in values.items():
        if value is None:
            raise ConfigError(
                f"{key}=null sets nothing; to take a value back, use 'fleet config unset'"
            )
        if key in AgentConfig.__struct_fields__ and not is_setting(key):
            raise ConfigError(
                f"{key} belongs to one device: set it in {CONFIG_FILE} in the device's folder, "
                f"and start the device again; {known_settings()}"
            )
    return dict(values)


def _unset_settings(context: OperationContext, removal: SettingsRemoval) -> ChangedSettings:
    """Remove values of a target. Raises as `set_settings`."""
    target = Target.parse(removal.target)
    _check_names(removal.keys)
    nothing = dict.fromkeys(removal.keys)
    return _change(
        context, target, lambda settings: replace(settings, **nothing), removal.if_version
    )


def _check_names(keys: Sequence[str]) -> None:
    """Raise ConfigError unless each of at least one key is a setting."""
    for stray in keys:
        if not is_setting(stray):
            raise ConfigError(f"unknown setting {stray[:80]!r}; {known_settings()}")
    if not keys:
        raise ConfigError(f"nothing to unset: {known_settings()}")


def _change(
    context: OperationContext,
    target: Target,
    change: Callable[[Settings], Settings],
    if_version: int | None,
) -> ChangedSettings:
    desired_state = context.registry.desired_state
    version = desired_state.change_settings(target, change, if_version=if_version)
    settings = desired_state.settings(target)
    return ChangedSettings(target=str(target), version=version, settings=settings)


def _list_config_lags(context: OperationContext, query: LagQuery) -> ConfigLagList:
    """Return a page of the devices that do not follow."""
    desired, num_devices = context.registry.desired_state.lags(query.group)
    names, next_page = page_of(list(desired), query, str)
    rows = context.registry.stats.devices(names)
    lags = [_lag(row, desired[row.device]) for row in rows]
    return ConfigLagList(lags=lags, num_devices=num_devices, next_page=next_page)


def _lag(row: DeviceRow, desired_version: int) -> ConfigLag:
    return ConfigLag(
        device=row.device,
        online=row.online,
        wanted_version=desired_version,
        config_version=row.config_version,
        config_error=row.config_error,
        last_seen=row.last_seen,
    )


SETTINGS_HANDLERS: Final[Handlers] = {
    SHOW_SETTINGS: _show_settings,
    SET_SETTINGS: _set_settings,
    UNSET_SETTINGS: _unset_settings,
    LIST_CONFIG_LAGS: _list_config_lags,
}
