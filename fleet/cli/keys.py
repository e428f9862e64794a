"""`fleet key`: the keys with which apps use the HTTP API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from fleet.cli.access import call_fleet
from fleet.cli.allow import AppArgument
from fleet.cli.fitted_table import FittedTable
from fleet.cli.options import (
    HomeOption,
    JsonOption,
    checked_name,
    format_time,
    parse_ttl,
    print_json,
)
from fleet.operator_api.key_operations import (
    CREATE_KEY,
    LIST_KEYS,
    MAX_LIFE_S,
    REVOKE_KEY,
    KeyName,
    KeyOrder,
    KeyQuery,
)
from fleet.registry.results import ApiKeyRow
from fleet.utils.command_group import CommandGroup
from fleet.utils.console import new_console
from fleet.utils.printable import print_line

app = typer.Typer(
    cls=CommandGroup, no_args_is_help=True, help="Create and revoke keys for the HTTP API."
)

AllowedOption = Annotated[
    list[str] | None,
    typer.Option("--allow", help="Device, group or tag that the app may prompt; repeatable."),
]
ExpiresOption = Annotated[
    str | None, typer.Option(help="Lifetime, such as 24h or 90d (default: until it is revoked).")
]
OnlyAppArgument = Annotated[
    str | None,
    typer.Argument(metavar="[APP]", help="Only the keys of this app.", callback=checked_name),
]
KeyIdArgument = Annotated[str, typer.Argument(metavar="ID", help="Id; see `fleet key list`.")]


@app.command("create")
def create_key(
    name: AppArgument,
    allow: AllowedOption = None,
    expires: ExpiresOption = None,
    folder: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Create a key for an app, and print it once; with --allow the app may be a new name."""
    life_s = None if expires is None else parse_ttl(expires, MAX_LIFE_S, "expires")
    order = KeyOrder(app=name, allow=tuple(allow or ()), life_s=life_s)
    created = call_fleet(folder, CREATE_KEY, order)
    if as_json:
        print_json(created)
    else:
        expires_at = created.expires_at
        until = "it is revoked" if expires_at is None else format_time(expires_at)
        print_line(f"{name} may use this key until {until}; it is not shown again:")
        print_line(f"  {created.key}")


@app.command("list")
def list_keys(
    name: OnlyAppArgument = None, folder: HomeOption = None, as_json: JsonOption = False
) -> None:
    """List the keys, also those that are revoked or expired."""
    rows = call_fleet(folder, LIST_KEYS, KeyQuery(app=name)).keys
    if as_json:
        print_json(rows)
    elif rows:
        new_console().print(keys_table(rows))
    else:
        print("keys: none of these; create one with 'fleet key create APP'")


@app.command("revoke")
def revoke_api_key(
    key_id: KeyIdArgument, folder: HomeOption = None, as_json: JsonOption = False
) -> None:
    """Revoke a key for good; answers that it asked for end within seconds."""
    revoked = call_fleet(folder, REVOKE_KEY, KeyName(key_id=key_id))
    if as_json:
        print_json(revoked)
    else:
        print_line(f"key {key_id} of {revoked.app} is revoked")


def keys_table(rows: Sequence[ApiKeyRow]) -> FittedTable:
    """Keys as a table of at most 80 columns."""
    table = FittedTable(title="keys", title_justify="left")
    for header in ("app", "id", "state", "created", "expires"):
        table.add_column(header, overflow="fold")
    for row in rows:
        expires = format_time(row.expires_at)
        table.add_row(row.app, row.id, row.state, format_time(row.created_at), expires)
    return table
