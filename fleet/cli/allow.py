"""`fleet allow`, `fleet disallow` and `fleet tag`: the devices that an app may prompt."""

from __future__ import annotations

from typing import Annotated

import typer

from fleet.cli.options import DeviceArgument, HomeOption, JsonOption, checked_name, print_json
from fleet.errors import ConfigError
from fleet.identity.enrolment import format_tags, parse_tags
from fleet.server.home import FleetHome
from fleet.utils.printable import print_line

AppArgument = Annotated[
    str, typer.Argument(metavar="APP", help="An app or a sensor.", callback=checked_name)
]
TargetsArgument = Annotated[
    list[str], typer.Argument(metavar="TARGET...", help="Devices, groups, or tags KEY=VALUE.")
]
TagsArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE...]", help="Tags to set.")
]
RemoveOption = Annotated[
    list[str] | None, typer.Option(metavar="KEY", help="Tag to remove; repeatable.")
]


def allow_app(
    app: AppArgument,
    targets: TargetsArgument,
    folder: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let an app prompt devices, and devices act on its events, from now on."""
    home = FleetHome.load(folder)
    with home.registry() as registry:
        registry.identities.allow(app, targets)
    _print_targets(home, app, as_json=as_json)


def disallow_app(
    app: AppArgument,
    targets: TargetsArgument,
    folder: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Withdraw targets that 'fleet allow' or 'fleet enroll --allow' gave, by the same names."""
    home = FleetHome.load(folder)
    with home.registry() as registry:
        registry.identities.disallow(app, targets)
    _print_targets(home, app, as_json=as_json)


def tag_device(
    device: DeviceArgument,
    tags: TagsArgument = None,
    remove: RemoveOption = None,
    folder: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Set or remove tags of a device; apps may be allowed all devices of a tag."""
    if not tags and not remove:
        raise ConfigError("nothing to do: give tags like floor=1, or --remove floor")
    new_tags = parse_tags(tags or ())
    both = ", ".join(key for key in new_tags if key in (remove or ()))
    if both:
        raise ConfigError(f"{both} is to be set and to be removed; give each tag once")
    with FleetHome.load(folder).registry() as registry:
        registry.identities.tag(device, new_tags, remove or ())
        row = registry.stats.device(device)
    if as_json:
        print_json({"device": device, "tags": row.tags})
    else:
        print_line(f"{device} has {', '.join(format_tags(row.tags)) or 'no tags'}")


def _print_targets(home: FleetHome, app: str, *, as_json: bool) -> None:
    with home.registry() as registry:
        (row,) = (row for row in registry.identities.all() if row.name == app)
    if as_json:
        print_json({"app": app, "targets": row.targets})
    else:
        print_line(f"{app} may prompt {', '.join(row.targets) or 'no device'}")
