"""`fleet config`: desired settings of all devices, of a group or of one device."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import typer

from fleet.cli.access import call_fleet, fleet_access
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
from fleet.operator_api.paging import MAX_PAGE, walk_pages
from fleet.operator_api.settings_operations import (
    LIST_CONFIG_LAGS,
    SET_SETTINGS,
    SHOW_SETTINGS,
    UNSET_SETTINGS,
    ChangedSettings,
    LagQuery,
    SettingsChange,
    SettingsRemoval,
    SettingsTarget,
    TargetSettings,
)
from fleet.protocol.desired_config import is_setting, known_settings
from fleet.protocol.topics import check_name
from fleet.registry.targets import Scope, Target
from fleet.utils.command_group import CommandGroup
from fleet.utils.console import new_console
from fleet.utils.paths import absolute_path
from fleet.utils.printable import count, print_line
from fleet.utils.text_files import decode_json, read_json

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
    if len(others) > 1 or (not pairs and any(map(is_setting, others))):
        raise ConfigError(f"expected KEY=VALUE, got {' '.join(others)!r}; {known_settings()}")
    target = parse_target(others, group, everywhere=everywhere)
    if not pairs:
        raise ConfigError(f"nothing to set: expected KEY=VALUE; {known_settings()}")
    change = SettingsChange(target=str(target), settings=_parse_pairs(pairs))
    _print(call_fleet(folder, SET_SETTINGS, change), as_json=as_json)


@app.command()
def unset(
    words: KeysArgument,
    group: TargetGroupOption = None,
    everywhere: AllOption = False,
    folder: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove values, so that a wider scope or the device itself decides again."""
    keys = [word for word in words if is_setting(word)]
    others = [word for word in words if not is_setting(word)]
    num_devices = int(group is None and not everywhere)
    for stray in others[num_devices:]:
        raise ConfigError(f"unknown setting {stray[:80]!r}; {known_settings()}")
    target = parse_target(others, group, everywhere=everywhere)
    if not keys:
        raise ConfigError(f"nothing to unset: {known_settings()}")
    removal = SettingsRemoval(target=str(target), keys=tuple(keys))
    _print(call_fleet(folder, UNSET_SETTINGS, removal), as_json=as_json)


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
    shown = call_fleet(folder, SHOW_SETTINGS, SettingsTarget(target=str(target)))
    _print(shown, as_json=as_json, with_version=device is not None)


@app.command()
def diff(
    group: GroupOption = None,
    folder: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the devices that do not follow: desired version, current version, and the reason."""
    with fleet_access(folder) as access:
        query = LagQuery(group=group, limit=MAX_PAGE)
        pages = list(walk_pages(access, LIST_CONFIG_LAGS, query))
    lags = [row for page in pages for row in page.lags]
    if lags or as_json:
        print_rows(new_console(), lags, "devices that have not followed", as_json=as_json)
    else:
        number = pages[-1].num_devices
        print(("all " if number > 1 else "") + count(number, "device follows", "devices follow"))


def parse_target(names: list[str], group: str | None, *, everywhere: bool) -> Target:
    """The target of exactly one of a device's name, --group and --all."""
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


def _parse_pairs(pairs: Sequence[str]) -> dict[str, Any]:
    """The value of each setting; a second value of one is an error, not a choice."""
    values: dict[str, Any] = {}
    for key, value in map(_parse_pair, pairs):
        if key in values:
            raise ConfigError(f"{key} is given twice; give each setting once")
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


def _print(
    shown: ChangedSettings | TargetSettings, *, as_json: bool, with_version: bool = True
) -> None:
    version: dict[str, Any] = {"version": shown.version} if with_version else {}
    if as_json:
        print_json({"target": shown.target} | version | {"settings": shown.settings})
        return
    suffix = f", version {shown.version}" if with_version else ""
    settings = msgspec.to_builtins(shown.settings)
    print_line(f"{shown.target}{suffix}" + ("" if settings else ": nothing is set"))
    for key, value in settings.items():
        print(f"  {key}={json.dumps(value)}")
