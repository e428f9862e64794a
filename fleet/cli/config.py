"""`fleet config`: desired settings of all devices, of a group or of one device."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec
import typer
from msgspec import Struct
from msgspec.structs import replace

from edge_agent.config import CONFIG_FILE, AgentConfig
from fleet.cli.options import (
    GroupOption,
    HomeOption,
    JsonOption,
    checked_group,
    checked_name,
    print_json,
)
from fleet.cli.views import print_rows
from fleet.errors import ConfigError
from fleet.protocol.desired_config import Settings, merge_scopes, parse_settings
from fleet.protocol.report import ConfigProblem
from fleet.protocol.topics import check_name
from fleet.registry.results import DeviceRow
from fleet.server.home import FleetHome
from fleet.utils.command_group import CommandGroup
from fleet.utils.console import new_console
from fleet.utils.optional_imports import needs
from fleet.utils.paths import absolute_path
from fleet.utils.printable import count
from fleet.utils.text_files import decode_json, read_json

if TYPE_CHECKING:
    from fleet.registry.settings import Target

app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    help="Set and show the desired settings of all devices, of a group or of one device.",
)

TEXT_SETTINGS: Final = (
    "mode",
    "upload_dtype",
    "upload_prompt",
    "bundle",
    "software",
    "system_prompt",
)

PairsArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="[DEVICE] KEY=VALUE...",
        help="A device, unless --group or --all is given; settings in JSON or from @FILE.json.",
    ),
]
KeysArgument = Annotated[
    list[str], typer.Argument(metavar="[DEVICE] KEY...", help="Settings to remove.")
]
DeviceArgument = Annotated[
    str | None,
    typer.Argument(
        help="Show the settings of this device, merged from all scopes.", callback=checked_name
    ),
]
TargetGroupOption = Annotated[
    str | None,
    typer.Option("--group", help="Target the devices of this group.", callback=checked_group),
]
AllOption = Annotated[bool, typer.Option("--all", help="Target all devices.")]


class ConfigLag(Struct, frozen=True, kw_only=True):
    """A device that does not follow its desired configuration."""

    device: str
    online: bool
    wanted_version: int
    config_version: int
    config_error: ConfigProblem | None
    last_seen: float | None


@app.command("set")
def set_(
    words: PairsArgument,
    group: TargetGroupOption = None,
    everywhere: AllOption = False,
    folder: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Set values: `fleet config set kitchen threshold=0.8`, or with --group or --all."""
    pairs = [word for word in words if "=" in word]
    others = [word for word in words if "=" not in word]
    if len(others) > 1 or (not pairs and any(map(_is_setting, others))):
        raise ConfigError(f"expected KEY=VALUE, got {' '.join(others)!r}; {_list_settings()}")
    target = parse_target(others, group, everywhere=everywhere)
    if not pairs:
        raise ConfigError(f"nothing to set: expected KEY=VALUE; {_list_settings()}")
    values = _parse_pairs(pairs)
    _check_own(values)
    if isinstance(bundle := values.get("bundle"), str):  # also a name, or the beginning of an id
        with FleetHome.load(folder).registry() as registry:
            values["bundle"] = registry.rollouts.find_bundle(bundle)
    changes = parse_settings(values)
    _change(folder, target, lambda settings: merge_scopes(settings, changes), as_json=as_json)


@app.command()
def unset(
    words: KeysArgument,
    group: TargetGroupOption = None,
    everywhere: AllOption = False,
    folder: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove values, so that a wider scope or the device itself decides again."""
    keys = [word for word in words if _is_setting(word)]
    others = [word for word in words if not _is_setting(word)]
    num_devices = int(group is None and not everywhere)
    for stray in others[num_devices:]:
        raise ConfigError(f"unknown setting {stray[:80]!r}; {_list_settings()}")
    target = parse_target(others, group, everywhere=everywhere)
    if not keys:
        raise ConfigError(f"nothing to unset: {_list_settings()}")
    nothing = dict.fromkeys(keys)
    _change(folder, target, lambda settings: replace(settings, **nothing), as_json=as_json)


@app.command()
def show(
    device: DeviceArgument = None,
    group: TargetGroupOption = None,
    everywhere: AllOption = False,
    folder: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the merged settings of a device, or those set for a group or for all."""
    target = parse_target([device] if device else [], group, everywhere=everywhere)
    with FleetHome.load(folder).registry() as registry:
        if device is None:
            values: dict[str, Any] = {"settings": registry.desired_state.settings(target)}
        else:
            registry.stats.device(device)
            desired = registry.desired_state.configs([device])[device]
            settings = replace(desired.settings, software=desired.software)
            values = {"version": desired.version, "settings": settings}
    _print({"target": str(target)} | values, as_json=as_json)


@app.command()
def diff(
    group: GroupOption = None,
    folder: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the devices that do not follow: desired version, current version, and the reason."""
    with FleetHome.load(folder).registry() as registry:
        desired = registry.desired_state.configs()
        rows = [
            _lag(row, desired[row.device].version)
            for row in registry.stats.devices()
            if (group is None or row.group == group) and row.device in desired
        ]
    lags = [row for row in rows if row.wanted_version != row.config_version or row.config_error]
    if lags or as_json:
        print_rows(new_console(), lags, "devices that have not followed", as_json=as_json)
    else:
        print(
            ("all " if len(rows) > 1 else "") + count(len(rows), "device follows", "devices follow")
        )


def _lag(row: DeviceRow, desired_version: int) -> ConfigLag:
    return ConfigLag(
        device=row.device,
        online=row.online,
        wanted_version=desired_version,
        config_version=row.config_version,
        config_error=row.config_error,
        last_seen=row.last_seen,
    )


def parse_target(names: list[str], group: str | None, *, everywhere: bool) -> Target:
    """The target of exactly one of a device's name, --group and --all."""
    with needs("server"):
        from fleet.registry.settings import Scope, Target
    if len(names) + (group is not None) + everywhere != 1:
        chosen = [*names, *([f"--group {group}"] if group is not None else [])]
        chosen += ["--all"] if everywhere else []
        raise ConfigError(
            "expected one device, or --group G, or --all, "
            f"got {' and '.join(chosen) or 'none of them'}"
        )
    if group is not None:
        return Target(Scope.GROUP, group)
    return Target(Scope.ALL) if everywhere else Target(Scope.DEVICE, check_name(names[0]))


def _is_setting(word: str) -> bool:
    return word in Settings.__struct_fields__


def _check_own(values: dict[str, Any]) -> None:
    """Raise ConfigError for a setting that a device reads from its own file only."""
    for key in values:
        if key in AgentConfig.__struct_fields__ and not _is_setting(key):
            raise ConfigError(
                f"{key} belongs to one device: set it in {CONFIG_FILE} in the device's folder, "
                f"and start the device again; {_list_settings()}"
            )


def _parse_pairs(pairs: Sequence[str]) -> dict[str, Any]:
    """The value of each setting; a null or a second value of one is an error, not a choice."""
    values: dict[str, Any] = {}
    for key, value in map(_parse_pair, pairs):
        if key in values:
            raise ConfigError(f"{key} is given twice; give each setting once")
        if value is None:
            raise ConfigError(
                f"{key}=null sets nothing; to take a value back, use 'fleet config unset'"
            )
        values[key] = value
    return values


def _parse_pair(pair: str) -> tuple[str, Any]:
    key, _, text = (part.strip() for part in pair.partition("="))
    if text.startswith("@"):
        return key, read_json(absolute_path(Path(text[1:])), Any, "give a file of JSON")
    return key, _parse_value(key, text)


def _parse_value(key: str, text: str) -> Any:
    """Parse JSON, or a text without quotation marks; 2026.1 may also be the name of a bundle."""
    if key in TEXT_SETTINGS and text != "null" and not text.startswith('"'):
        return text
    with suppress(ValueError):
        if not math.isfinite(float(text)):
            raise ConfigError(f"{text} is not finite; expected a number such as 0.9")
    if text.startswith(("[", "{")):
        return decode_json(text.encode(), key)
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text  # a string without quotation marks


def _change(
    folder: Path | None,
    target: Target,
    change: Callable[[Settings], Settings],
    *,
    as_json: bool,
) -> None:
    with FleetHome.load(folder).registry() as registry:
        version = registry.desired_state.change_settings(target, change)
        settings = registry.desired_state.settings(target)
    _print({"target": str(target), "version": version, "settings": settings}, as_json=as_json)


def _print(values: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(values)
        return
    version = f", version {values['version']}" if "version" in values else ""
    settings = msgspec.to_builtins(values["settings"])
    print(f"{values['target']}{version}" + ("" if settings else ": nothing is set"))
    for key, value in settings.items():
        print(f"  {key}={json.dumps(value)}")


def _list_settings() -> str:
    return f"known settings are {', '.join(Settings.__struct_fields__)}"
