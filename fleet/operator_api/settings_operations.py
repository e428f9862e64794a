"""Operations on the desired settings of all devices, of a group, and of one device."""

from __future__ import annotations

from typing import Any, Final

from msgspec import Struct

from fleet.operator_api.operation import Operation, OperatorRole
from fleet.operator_api.paging import ListPage, PageQuery
from fleet.protocol.desired_config import Settings
from fleet.protocol.report import ConfigProblem
from fleet.protocol.types import Amount


class SettingsTarget(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A target: ``all``, ``group:NAME`` or ``device:NAME``."""

    target: str


class ScopeSettings(Struct, frozen=True, kw_only=True):
    """The settings of one target itself, and their version; 0 if it has never had any."""

    target: str
    version: int
    settings: Settings


class TargetSettings(Struct, frozen=True, kw_only=True):
    """The settings of a target, merged from `scopes`, the widest first.

    Those of all or of a group are its own alone. `version` is the newest of the scopes.
    """

    target: str
    version: int
    settings: Settings
    scopes: list[ScopeSettings]


class SettingsChange(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of a target to set; the bundle may be a name, or the beginning of an id.

    With `if_version` the change is refused when the settings of the target have another version by
    now, because another operator has changed them.
    """

    target: str
    settings: dict[str, Any]
    if_version: Amount | None = None


class SettingsRemoval(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Names of settings, which a wider scope or the device itself decides again.

    `if_version` is as in `SettingsChange`.
    """

    target: str
    keys: tuple[str, ...]
    if_version: Amount | None = None


class ChangedSettings(Struct, frozen=True, kw_only=True):
    """The settings of a target itself after a change, and their version."""

    target: str
    version: int
    settings: Settings


class LagQuery(PageQuery, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The devices that do not follow, of one page and of a group where it is given."""

    group: str | None = None


class ConfigLag(Struct, frozen=True, kw_only=True):
    """A device that does not follow its desired configuration."""

    device: str
    online: bool
    wanted_version: int
    config_version: int
    config_error: ConfigProblem | None
    last_seen: float | None


class ConfigLagList(ListPage, frozen=True, kw_only=True):
    """A page of the devices that do not follow; `num_devices` were compared."""

    lags: list[ConfigLag]
    num_devices: int


SHOW_SETTINGS: Final = Operation(
    method="GET",
    path="/settings/{target}",
    role=OperatorRole.VIEWER,
    request=SettingsTarget,
    response=TargetSettings,
    summary="Show the merged settings of a device, or those set for a group or for all.",
)
SET_SETTINGS: Final = Operation(
    method="PATCH",
    path="/settings/{target}",
    role=OperatorRole.OPERATOR,
    request=SettingsChange,
    response=ChangedSettings,
    summary="Set values for a device, a group or all.",
)
UNSET_SETTINGS: Final = Operation(
    method="POST",
    path="/settings/{target}/unset",
    role=OperatorRole.OPERATOR,
    request=SettingsRemoval,
    response=ChangedSettings,
    summary="Remove values, so that a wider scope or the device itself decides again.",
)
LIST_CONFIG_LAGS: Final = Operation(
    method="GET",
    path="/config-lags",
    role=OperatorRole.VIEWER,
    request=LagQuery,
    response=ConfigLagList,
    summary="List the devices that do not follow: desired version, current version, the reason.",
)
