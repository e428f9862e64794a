"""`fleet update`: versions of the devices' software, and their roll-out by groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from msgspec import Struct

from fleet.bundles.software import kept_versions
from fleet.cli.config import AllOption, TargetGroupOption, parse_target
from fleet.cli.options import GroupOption, HomeOption, JsonOption, checked_name, print_json
from fleet.cli.views import print_rows
from fleet.errors import SoftwareError
from fleet.protocol.desired_config import DesiredConfig
from fleet.registry.results import DeviceRow
from fleet.server.home import FleetHome
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


class UpdateState(StrEnum):
    """The state of a device's software; `own` is that of a device without a desired version."""

    OWN = "own"
    CURRENT = "current"
    PENDING = "pending"
    FAILED = "failed"


class VersionRow(Struct, frozen=True, kw_only=True):
    """A version that devices run or that the server offers, and its numbers of devices."""

    version: str
    is_kept: bool
    running: int
    desired: int
    failed: int


class UpdateRow(Struct, frozen=True, kw_only=True):
    """The software of one device; `problem` is why it does not run the desired version."""

    device: str
    group: str | None
    online: bool
    version: str
    desired: str | None
    state: UpdateState
    problem: str


@app.command("add")
def add_version(
    wheel: WheelArgument, folder: HomeOption = None, as_json: JsonOption = False
) -> None:
    """Check a wheel, sign it with the fleet's key, and offer it to devices."""
    manifest = FleetHome.load(folder).keep_software(wheel)
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
    home = FleetHome.load(folder)
    rows = version_rows(kept_versions(home.software), read_updates(home))
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
    home = FleetHome.load(folder)
    versions = kept_versions(home.software)
    if version not in versions:
        raise SoftwareError(
            f"no version {version[:80]!r} here, but {', '.join(versions) or 'none'}; "
            "add it with 'fleet update add WHEEL'"
        )
    if device is None and not force:
        check_stage(version, read_updates(home), is_last=everywhere)
    with home.registry() as registry:
        number = registry.desired_state.roll_out_software(target, version)
    if as_json:
        print_json({"target": str(target), "version": number, "software": version})
    else:
        print_line(f"version {version} is desired for {target}; see 'fleet update status'")


@app.command("status")
def list_updates(
    group: GroupOption = None, folder: HomeOption = None, as_json: JsonOption = False
) -> None:
    """Show each device's running and desired version, and why they differ."""
    rows = [row for row in read_updates(FleetHome.load(folder)) if group in (None, row.group)]
    print_rows(new_console(), rows, "software of the devices", as_json=as_json)


def check_stage(version: str, rows: Iterable[UpdateRow], *, is_last: bool) -> None:
    """Refuse the next stage of a roll-out that has failed, or the last one without an earlier one.

    Raises:
        SoftwareError: a device has failed to run `version`, or none runs it yet and `is_last`.
    """
    concerned = [row for row in rows if row.desired == version]
    failed = [row for row in concerned if row.state is UpdateState.FAILED]
    if failed:
        raise SoftwareError(
            f"{failed[0].device} does not run version {version}: {failed[0].problem}; "
            "correct that, or give --force"
        )
    if is_last and not any(row.state is UpdateState.CURRENT for row in concerned):
        raise SoftwareError(
            f"no device runs version {version} yet: expected an earlier stage, such as "
            f"'fleet update rollout {version} --group GROUP'; wait for it, or give --force"
        )


def read_updates(home: FleetHome) -> list[UpdateRow]:
    """Return the software of every device, by name."""
    with home.registry() as registry:
        return update_rows(registry.stats.devices(), registry.desired_state.configs())


def update_rows(
    devices: Iterable[DeviceRow], configs: Mapping[str, DesiredConfig]
) -> list[UpdateRow]:
    """Return the software of devices with their desired configurations."""
    return [_update_row(row, configs[row.device]) for row in devices]


def _update_row(row: DeviceRow, config: DesiredConfig) -> UpdateRow:
    desired = config.software
    error = row.software_error
    is_newest = row.config_version == config.version  # else the error is that of an earlier one
    if desired is None:
        state = UpdateState.OWN
    elif desired == row.version:
        state = UpdateState.CURRENT
    elif error and error.is_final and is_newest:
        state = UpdateState.FAILED
    else:
        state = UpdateState.PENDING
    return UpdateRow(
        device=row.device,
        group=row.group,
        online=row.online,
        version=row.version,
        desired=desired,
        state=state,
        problem=error.message if error else "",
    )


def version_rows(kept: Sequence[str], updates: Sequence[UpdateRow]) -> list[VersionRow]:
    """Return the versions that are kept, then others that devices run."""
    others = sorted({row.version for row in updates if row.version} - {*kept})
    return [
        VersionRow(
            version=version,
            is_kept=version in kept,
            running=sum(row.version == version for row in updates),
            desired=sum(row.desired == version for row in updates),
            failed=sum(
                row.desired == version and row.state is UpdateState.FAILED for row in updates
            ),
        )
        for version in [*kept, *others]
    ]
