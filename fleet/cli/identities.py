"""`fleet identities`, `fleet group` and `fleet delete`: the identities, and their life."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from fleet.cli.access import call_fleet, fleet_access
from fleet.cli.fitted_table import FittedTable
from fleet.cli.options import (
    GroupOption,
    HomeOption,
    JsonOption,
    checked_name,
    format_time,
    print_json,
)
from fleet.errors import ConfigError
from fleet.identity.enrolment import format_tags, parse_role
from fleet.operator_api.device_operations import MOVE_DEVICE, GroupChange
from fleet.operator_api.identity_operations import (
    DELETE_IDENTITY,
    LIST_IDENTITIES,
    IdentityKey,
    IdentityQuery,
)
from fleet.operator_api.paging import MAX_PAGE, walk_pages
from fleet.registry.results import IdentityRow
from fleet.utils.console import new_console
from fleet.utils.printable import print_line

IdentityArgument = Annotated[
    str,
    typer.Argument(
        metavar="NAME", help="An identity; see `fleet identities`.", callback=checked_name
    ),
]
MovedDeviceArgument = Annotated[str, typer.Argument(metavar="DEVICE", help="Name of the device.")]
NewGroupArgument = Annotated[
    str | None, typer.Argument(metavar="[GROUP]", help="The device's group from now on.")
]
NoGroupOption = Annotated[bool, typer.Option("--none", help="Take the device out of its group.")]
IdentityRoleOption = Annotated[
    str | None, typer.Option("--role", help="Only identities of this role.")
]
IdentityStateOption = Annotated[
    str | None, typer.Option("--state", help="Only those that are pending, active, revoked, ...")
]


def identities(
    role: IdentityRoleOption = None,
    group: GroupOption = None,
    state: IdentityStateOption = None,
    folder: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the identities: role, state, group, tags, rights, end of the certificate."""
    only = parse_role(role) if role else None
    query = IdentityQuery(role=only, group=group, state=state, limit=MAX_PAGE)
    with fleet_access(folder) as access:
        pages = walk_pages(access, LIST_IDENTITIES, query)
        rows = [row for page in pages for row in page.identities]
    if as_json:
        print_json(rows)
    elif rows:
        new_console().print(identities_table(rows))
    else:
        print("identities: none of these; enrol one with 'fleet enroll NAME'")


def change_group(
    device: MovedDeviceArgument,
    group: NewGroupArgument = None,
    none: NoGroupOption = False,
    folder: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Change the group of a device: its settings and the apps that may prompt it follow."""
    if (group is None) != none:
        raise ConfigError("expected a GROUP or --none; give one of the two")
    row = call_fleet(folder, MOVE_DEVICE, GroupChange(device=device, group=group))
    if as_json:
        print_json({"device": device, "group": row.group})
    else:
        print_line(f"{device} is in group {row.group}" if row.group else f"{device} is in no group")


def delete_identity(
    name: IdentityArgument, folder: HomeOption = None, as_json: JsonOption = False
) -> None:
    """Delete an identity that is revoked or has never joined; its statistics stay."""
    deleted = call_fleet(folder, DELETE_IDENTITY, IdentityKey(name=name))
    if as_json:
        print_json(deleted)
    else:
        print_line(f"{name} is deleted; its name can be enrolled again")


def identities_table(rows: Sequence[IdentityRow]) -> FittedTable:
    """Identities as a table of at most 80 columns."""
    table = FittedTable(title="identities", title_justify="left")
    for header in ("name", "role", "state", "group and tags", "may prompt", "certificate ends"):
        table.add_column(header, overflow="fold")
    for row in rows:
        labels = [row.group, *format_tags(row.tags)]
        table.add_row(
            row.name,
            row.role,
            row.state,
            "\n".join(label for label in labels if label) or "-",
            "\n".join(row.targets) or "-",
            format_time(row.not_after or None),
        )
    return table
