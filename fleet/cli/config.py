"""`fleet config`: what operators want of all devices, of a group or of one, and who follows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer
from msgspec import Struct
from msgspec.structs import replace
from rich.console import Console

from fleet.cli.stats import JsonOption, StateOption
from fleet.errors import ConfigError
from fleet.protocol.desired_config import Settings, merge, parse_settings
from fleet.server.home import FleetHome
from fleet.utils.optional_imports import load

if TYPE_CHECKING:
    from fleet.registry.settings import Target
    from fleet.registry.store import Registry

app = typer.Typer(no_args_is_help=True, help=__doc__)

NAME_OR_PAIR = (
    "A device's name, unless --group or --all is given; then KEY=VALUE, as JSON or @FILE.json."
)
GroupOption = Annotated[str | None, typer.Option("--group", help="Of the devices of this group.")]
AllOption = Annotated[bool, typer.Option("--all", help="Of all devices.")]


class Follower(Struct, frozen=True, kw_only=True):
    """A device, the version that it shall follow, and the one that it said it does."""

    device: str
    online: bool
    wanted_version: int
    config_version: int
    config_error: str
    last_seen: float | None


@app.command("set")
def set_(
    words: Annotated[list[str], typer.Argument(metavar="[DEVICE] KEY=VALUE...", help=NAME_OR_PAIR)],
    group: GroupOption = None,
    everywhere: AllOption = False,
    state: StateOption = None,
    as_json: JsonOption = False,
) -> None:
    """Change settings: `fleet config set kitchen threshold=0.8`, or with --group, or --all."""
    pairs = [word for word in words if "=" in word]
    target = _target([word for word in words if "=" not in word], group, everywhere=everywhere)
    changes = parse_settings(dict(map(_parse_pair, pairs)))
    if not pairs:
        raise ConfigError(f"nothing to set: expected KEY=VALUE; known settings are {_known()}")
    with FleetHome.load(state or FleetHome.default_folder()).registry() as registry:
        _change(registry, target, lambda settings: merge(settings, changes), as_json=as_json)


@app.command()
def unset(
    words: Annotated[
        list[str],
        typer.Argument(metavar="[DEVICE] KEY...", help="What is not to be said any more."),
    ],
    group: GroupOption = None,
    everywhere: AllOption = False,
    state: StateOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take settings back, so that a wider scope, or the device itself, decides again."""
    keys = [word for word in words if word in Settings.__struct_fields__]
    target = _target([word for word in words if word not in keys], group, everywhere=everywhere)
    if not keys:
        raise ConfigError(f"nothing to unset: known settings are {_known()}")
    with FleetHome.load(state or FleetHome.default_folder()).registry() as registry:
        nothing = dict.fromkeys(keys)
        _change(registry, target, lambda settings: replace(settings, **nothing), as_json=as_json)


@app.command()
def show(
    device: Annotated[
        str | None, typer.Argument(help="What holds for this device, of all scopes together.")
    ] = None,
    group: GroupOption = None,
    everywhere: AllOption = False,
    state: StateOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what is wanted: of a device in the end, or what was said for a group or for all."""
    target = _target([device] if device else [], group, everywhere=everywhere)
    with FleetHome.load(state or FleetHome.default_folder()).registry() as registry:
        if device is None:
            shown: dict[str, Any] = {"target": str(target), "settings": registry.settings(target)}
        else:
            registry.device(device)
            desired = registry.desired_configs([device])[device]
            shown = {
                "target": str(target),
                "version": desired.version,
                "settings": desired.settings,
            }
    _print(shown, as_json=as_json)


@app.command()
def diff(
    group: GroupOption = None,
    state: StateOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the devices that have not followed: the version wanted, the one followed, and why."""
    from fleet.cli.views import print_rows

    with FleetHome.load(state or FleetHome.default_folder()).registry() as registry:
        wanted = registry.desired_configs()
        rows = [
            Follower(
                device=row.device,
                online=row.online,
                wanted_version=wanted[row.device].version,
                config_version=row.config_version,
                config_error=row.config_error,
                last_seen=row.last_seen,
            )
            for row in registry.devices()
            if (group is None or row.group == group) and row.device in wanted
        ]
    behind = [row for row in rows if row.wanted_version != row.config_version or row.config_error]
    if behind or as_json:
        print_rows(Console(), behind, "devices that have not followed", as_json=as_json)
    else:
        print(f"all {len(rows)} devices follow")


def _target(names: list[str], group: str | None, *, everywhere: bool) -> Target:
    """Exactly one of a device's name, --group and --all."""
    configs = load("fleet.registry.settings")
    if len(names) + (group is not None) + everywhere != 1:
        raise ConfigError(
            f"expected one device, or --group G, or --all, got {', '.join(names) or 'none of them'}"
        )
    if group is not None:
        target: Target = configs.Target(configs.Scope.GROUP, group)
    elif everywhere:
        target = configs.Target(configs.Scope.ALL)
    else:
        target = configs.Target(configs.Scope.DEVICE, names[0])
    return target


def _parse_pair(pair: str) -> tuple[str, Any]:
    key, _, text = pair.partition("=")
    if text.startswith("@"):
        try:
            text = Path(text[1:]).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read {text[1:]}: {error}; expected a file of JSON") from None
        try:
            return key, json.loads(text)
        except ValueError as error:
            raise ConfigError(f"{pair}: expected a file of JSON: {error}") from None
    try:
        return key, json.loads(text)
    except ValueError:
        return key, text  # a word without quotation marks


def _change(
    registry: Registry, target: Target, change: Callable[[Settings], Settings], *, as_json: bool
) -> None:
    version = registry.change_settings(target, change)
    _print(
        {"target": str(target), "version": version, "settings": registry.settings(target)},
        as_json=as_json,
    )


def _print(shown: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(msgspec.json.encode(shown).decode())
        return
    version = f", version {shown['version']}" if "version" in shown else ""
    values = msgspec.to_builtins(shown["settings"])
    print(f"{shown['target']}{version}" + ("" if values else ": nothing is set"))
    for key, value in values.items():
        print(f"  {key}={json.dumps(value)}")


def _known() -> str:
    return ", ".join(Settings.__struct_fields__)
