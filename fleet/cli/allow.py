"""`fleet allow`, `fleet disallow` and `fleet tag`: which apps may ask which devices."""

from __future__ import annotations

from typing import Annotated

import msgspec
import typer

from fleet.cli.stats import JsonOption, StateOption
from fleet.errors import ConfigError
from fleet.identity.enrolment import parse_tags, tag_words
from fleet.server.home import FleetHome

AppArgument = Annotated[str, typer.Argument(metavar="APP", help="An app or a sensor.")]
TargetsArgument = Annotated[
    list[str], typer.Argument(metavar="TARGET...", help="Devices, groups, or tags KEY=VALUE.")
]


def allow(
    app: AppArgument,
    targets: TargetsArgument,
    state: StateOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let an app prompt devices, and devices act on its events, from now on."""
    with FleetHome.load(state or FleetHome.default_folder()).registry() as registry:
        registry.allow(app, targets)
        (row,) = [row for row in registry.identities() if row.name == app]
    _print(
        f"{app} may ask {', '.join(row.targets)}",
        {"app": app, "targets": row.targets},
        as_json=as_json,
    )


def disallow(
    app: AppArgument,
    targets: TargetsArgument,
    state: StateOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take back what 'fleet allow' or 'fleet enroll --allow' gave, by the same words."""
    with FleetHome.load(state or FleetHome.default_folder()).registry() as registry:
        registry.disallow(app, targets)
        (row,) = [row for row in registry.identities() if row.name == app]
    _print(
        f"{app} may ask {', '.join(row.targets) or 'nobody'}",
        {"app": app, "targets": row.targets},
        as_json=as_json,
    )


def tag(
    device: Annotated[str, typer.Argument()],
    tags: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE...]", help="Tags to set.")
    ] = None,
    remove: Annotated[
        list[str] | None, typer.Option(metavar="KEY", help="Tag to take away; repeatable.")
    ] = None,
    state: StateOption = None,
    as_json: JsonOption = False,
) -> None:
    """Set or remove tags of a device; apps may be allowed all devices of a tag."""
    if not tags and not remove:
        raise ConfigError("nothing to do: give tags like floor=1, or --remove floor")
    wanted = parse_tags(tags or ())
    with FleetHome.load(state or FleetHome.default_folder()).registry() as registry:
        registry.tag(device, wanted, remove or ())
        row = registry.device(device)
    _print(
        f"{device} has {', '.join(tag_words(row.tags)) or 'no tags'}",
        {"device": device, "tags": row.tags},
        as_json=as_json,
    )


def _print(line: str, values: dict[str, object], *, as_json: bool) -> None:
    print(msgspec.json.encode(values).decode() if as_json else line)
