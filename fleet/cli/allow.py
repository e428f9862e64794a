"""`fleet allow`, `fleet disallow` and `fleet tag`: the devices that an app may prompt."""

from __future__ import annotations

from typing import Annotated

import typer

from fleet.cli.access import call_fleet
from fleet.cli.options import DeviceArgument, HomeOption, JsonOption, checked_name, print_json
from fleet.identity.enrolment import format_tags, parse_tags
from fleet.operator_api.device_operations import TAG_DEVICE, TagChange
from fleet.operator_api.identity_operations import ALLOW, DISALLOW, TargetChange
from fleet.registry.results import IdentityRow
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
    change = TargetChange(name=app, targets=tuple(targets))
    _print_targets(call_fleet(folder, ALLOW, change), as_json=as_json)


def disallow_app(
    app: AppArgument,
    targets: TargetsArgument,
    folder: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Withdraw targets that 'fleet allow' or 'fleet enroll --allow' gave, by the same names."""
    change = TargetChange(name=app, targets=tuple(targets))
    _print_targets(call_fleet(folder, DISALLOW, change), as_json=as_json)


def tag_device(
    device: DeviceArgument,
    tags: TagsArgument = None,
    remove: RemoveOption = None,
    folder: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Set or remove tags of a device; apps may be allowed all devices of a tag."""
    change = TagChange(device=device, tags=parse_tags(tags or ()), remove=tuple(remove or ()))
    change.check()
    row = call_fleet(folder, TAG_DEVICE, change)
    if as_json:
        print_json({"device": device, "tags": row.tags})
    else:
        print_line(f"{device} has {', '.join(format_tags(row.tags)) or 'no tags'}")


def _print_targets(row: IdentityRow, *, as_json: bool) -> None:
    if as_json:
        print_json({"app": row.name, "targets": row.targets})
    else:
        print_line(f"{row.name} may prompt {', '.join(row.targets) or 'no device'}")
