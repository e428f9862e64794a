"""`fleet key`: the keys with which apps use the HTTP API."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Final

import typer
from msgspec import Struct

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
from fleet.identity.enrolment import Enrolment
from fleet.protocol.access import Role
from fleet.protocol.types import DAY_S
from fleet.registry.results import ApiKeyRow
from fleet.server.home import FleetHome, check_own_names
from fleet.utils.command_group import CommandGroup
from fleet.utils.console import new_console

MAX_LIFE_S: Final = 3650 * DAY_S

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


class CreatedKey(Struct, frozen=True, kw_only=True):
    """A new key as `--json` shows it; `key` is shown once and not stored."""

    id: str
    app: str
    key: str
    expires_at: float | None


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
    expires_at = None if life_s is None else time.time() + life_s
    targets = tuple(dict.fromkeys(allow or ()))
    enrolment = Enrolment(name=name, role=Role.APP, targets=targets)
    enrolment.check()
    check_own_names([enrolment])
    with FleetHome.load(folder).registry() as registry:
        key = registry.api_keys.create(name, targets, expires_at)
    if as_json:
        print_json(CreatedKey(id=key.id, app=name, key=str(key), expires_at=expires_at))
    else:
        until = "it is revoked" if expires_at is None else format_time(expires_at)
        print(f"{name} may use this key until {until}; it is not shown again:\n  {key}")


@app.command("list")
def list_keys(
    name: OnlyAppArgument = None, folder: HomeOption = None, as_json: JsonOption = False
) -> None:
    """List the keys, also those that are revoked or expired."""
    with FleetHome.load(folder).registry() as registry:
        rows = registry.api_keys.all(name)
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
    with FleetHome.load(folder).registry() as registry:
        name = registry.api_keys.revoke(key_id)
    if as_json:
        print_json({"id": key_id, "app": name, "state": "revoked"})
    else:
        print(f"key {key_id} of {name} is revoked")


def keys_table(rows: Sequence[ApiKeyRow]) -> FittedTable:
    """Keys as a table of at most 80 columns."""
    table = FittedTable(title="keys", title_justify="left")
    for header in ("app", "id", "state", "created", "expires"):
        table.add_column(header, overflow="fold")
    for row in rows:
        expires = format_time(row.expires_at)
        table.add_row(row.app, row.id, row.state, format_time(row.created_at), expires)
    return table
