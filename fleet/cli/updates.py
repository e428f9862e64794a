"""`fleet update`: versions of the devices' software, and their roll-out by groups."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fleet.cli.access import call_fleet, fleet_access, own_home
from fleet.cli.config import AllOption, TargetGroupOption, parse_target
from fleet.cli.options import GroupOption, HomeOption, JsonOption, checked_name, print_json
from fleet.cli.views import print_rows
from fleet.operator_api.operation import NoFields
from fleet.operator_api.paging import MAX_PAGE, walk_pages
from fleet.operator_api.software_operations import (
    LIST_UPDATES,
    LIST_VERSIONS,
    ROLL_OUT_VERSION,
    UpdateQuery,
    VersionRollout,
)
from fleet.utils.command_group import CommandGroup
from fleet.utils.console import new_console
from fleet.utils.path_options import path_argument
from fleet.utils.printable import print_line

app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    help="Add versions of the devices' software, and roll them out.",
    rich_markup_mode=None,
)

WheelArgument = Annotated[
    Path, path_argument(metavar="WHEEL", help="A wheel of this project, *.whl.")
]
VersionArgument = Annotated[
    str, typer.Argument(metavar="VERSION", help="A version; see `fleet update list`.")
]
OneDeviceArgument = Annotated[
    str | None,
    typer.Argument(help="A device, unless --group or --all is given.", callback=checked_name),
]
ForceOption = Annotated[
    bool, typer.Option("--force", help="Also after a failure, or without an earlier stage.")
]


@app.command("add")
def add_version(
    wheel: WheelArgument, folder: HomeOption = None, as_json: JsonOption = False
) -> None:
    """Check a wheel, sign it with the fleet's key, and offer it to devices."""
    manifest = own_home(folder, "update add").keep_software(wheel)
    if as_json:
        print_json(manifest)
    else:
        print(
            f"version {manifest.version} is offered; next: "
            f"fleet update rollout {manifest.version} --group GROUP"
        )


@app.command("list")
def list_versions(folder: HomeOption = None, as_json: JsonOption = False) -> None:
    """List the versions: those that devices can fetch, and those that devices run."""
    rows = call_fleet(folder, LIST_VERSIONS, NoFields()).versions
    if rows or as_json:
        print_rows(new_console(), rows, "versions", as_json=as_json)
    else:
        print("versions: none yet; add one with 'fleet update add WHEEL'")


@app.command("rollout")
def roll_out_version(
    version: VersionArgument,
    device: OneDeviceArgument = None,
    group: TargetGroupOption = None,
    everywhere: AllOption = False,
    force: ForceOption = False,
    folder: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Bring a version to a device, to a group, then to all: each call is one stage."""
    target = parse_target([device] if device else [], group, everywhere=everywhere)
    rollout = VersionRollout(version=version, target=str(target), force=force)
    desired = call_fleet(folder, ROLL_OUT_VERSION, rollout)
    if as_json:
        print_json(desired)
    else:
        print_line(f"version {version} is desired for {target}; see 'fleet update status'")


@app.command("status")
def list_updates(
    group: GroupOption = None, folder: HomeOption = None, as_json: JsonOption = False
) -> None:
    """Show each device's running and desired version, and why they differ."""
    with fleet_access(folder) as access:
        pages = walk_pages(access, LIST_UPDATES, UpdateQuery(group=group, limit=MAX_PAGE))
        rows = [row for page in pages for row in page.updates]
    print_rows(new_console(), rows, "software of the devices", as_json=as_json)
