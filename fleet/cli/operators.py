"""`fleet operator`: people who use the console, and their keys."""

from __future__ import annotations

from typing import Annotated

import typer

from fleet.cli.access import call_fleet
from fleet.cli.fitted_table import FittedTable
from fleet.cli.options import (
    HomeOption,
    JsonOption,
    checked_name,
    format_time,
    parse_ttl,
    print_json,
)
from fleet.errors import ConfigError
from fleet.operator_api.operation import NoFields, OperatorRole
from fleet.operator_api.operator_operations import (
    ADD_OPERATOR,
    CREATE_OPERATOR_KEY,
    LIST_OPERATOR_KEYS,
    LIST_OPERATORS,
    MAKE_OPERATOR_LINK,
    MAX_KEY_S,
    REMOVE_OPERATOR,
    REVOKE_OPERATOR_KEY,
    SET_OPERATOR_ROLE,
    NewOperator,
    OperatorKeyName,
    OperatorKeyOrder,
    OperatorKeyQuery,
    OperatorLink,
    OperatorName,
)
from fleet.utils.command_group import CommandGroup
from fleet.utils.console import new_console
from fleet.utils.printable import print_line

app = typer.Typer(
    cls=CommandGroup, no_args_is_help=True, help="Add and remove people who use the console."
)
key_app = typer.Typer(
    cls=CommandGroup, no_args_is_help=True, help="Create and revoke keys for `fleet --server`."
)
app.add_typer(key_app, name="key")

NameArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="Name of the operator.", callback=checked_name)
]
OnlyNameArgument = Annotated[
    str | None,
    typer.Argument(metavar="[NAME]", help="Only of this operator.", callback=checked_name),
]
RoleOption = Annotated[str, typer.Option(help=f"One of {', '.join(OperatorRole)}.")]
RoleArgument = Annotated[
    str, typer.Argument(metavar="ROLE", help=f"One of {', '.join(OperatorRole)}.")
]
ExpiresOption = Annotated[
    str | None, typer.Option(help="Lifetime, such as 24h or 90d (default: until it is revoked).")
]
KeyIdArgument = Annotated[
    str, typer.Argument(metavar="ID", help="Id; see `fleet operator key list`.")
]


@app.command("add")
def add_operator(
    name: NameArgument,
    role: RoleOption = OperatorRole.VIEWER,
    folder: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Add a person, and print a link that signs in once."""
    link = call_fleet(folder, ADD_OPERATOR, NewOperator(name=name, role=parse_operator_role(role)))
    print_link(link, as_json=as_json)


@app.command("link")
def make_link(name: NameArgument, folder: HomeOption = None, as_json: JsonOption = False) -> None:
    """Print a link that signs an operator in once."""
    print_link(call_fleet(folder, MAKE_OPERATOR_LINK, OperatorName(name=name)), as_json=as_json)


@app.command("list")
def list_operators(folder: HomeOption = None, as_json: JsonOption = False) -> None:
    """List the operators: role, open sessions, keys, last seen."""
    rows = call_fleet(folder, LIST_OPERATORS, NoFields()).operators
    if as_json:
        print_json(rows)
        return
    table = _table("operators", ("name", "role", "sessions", "keys", "seen"))
    for row in rows:
        seen = format_time(row.last_seen)
        table.add_row(row.name, row.role, str(row.num_sessions), str(row.num_keys), seen)
    new_console().print(
        table if rows else "operators: none yet; add one with 'fleet operator add NAME'"
    )


@app.command("role")
def set_role(
    name: NameArgument,
    role: RoleArgument,
    folder: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Change the role of an operator."""
    change = NewOperator(name=name, role=parse_operator_role(role))
    changed = call_fleet(folder, SET_OPERATOR_ROLE, change)
    if as_json:
        print_json(changed)
    else:
        print_line(f"{name} is {changed.role} now")


@app.command("remove")
def remove_operator(
    name: NameArgument, folder: HomeOption = None, as_json: JsonOption = False
) -> None:
    """Remove an operator; open sessions and keys end at once."""
    removed = call_fleet(folder, REMOVE_OPERATOR, OperatorName(name=name))
    if as_json:
        print_json(removed)
    else:
        print(f"{name} is removed")


@key_app.command("create")
def create_operator_key(
    name: NameArgument,
    expires: ExpiresOption = None,
    folder: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Create a key for the scripts of an operator, and print it once."""
    life_s = None if expires is None else parse_ttl(expires, MAX_KEY_S, "expires")
    created = call_fleet(folder, CREATE_OPERATOR_KEY, OperatorKeyOrder(name=name, life_s=life_s))
    if as_json:
        print_json(created)
        return
    until = "it is revoked" if created.expires_at is None else format_time(created.expires_at)
    print_line(
        f"{name} may use this key until {until}, as FLEET_KEY or in a --key-file; it is not shown "
        "again:"
    )
    print_line(f"  {created.key}")


@key_app.command("list")
def list_operator_keys(
    name: OnlyNameArgument = None, folder: HomeOption = None, as_json: JsonOption = False
) -> None:
    """List the keys of operators, without their secrets."""
    rows = call_fleet(folder, LIST_OPERATOR_KEYS, OperatorKeyQuery(operator=name)).keys
    if as_json:
        print_json(rows)
        return
    table = _table("keys", ("operator", "id", "state", "created", "expires"))
    for row in rows:
        expires = format_time(row.expires_at)
        table.add_row(row.operator, row.id, row.state, format_time(row.created_at), expires)
    new_console().print(
        table if rows else "keys: none of these; create one with 'fleet operator key create NAME'"
    )


@key_app.command("revoke")
def revoke_operator_key(
    key_id: KeyIdArgument, folder: HomeOption = None, as_json: JsonOption = False
) -> None:
    """Revoke a key for good."""
    revoked = call_fleet(folder, REVOKE_OPERATOR_KEY, OperatorKeyName(key_id=key_id))
    if as_json:
        print_json(revoked)
    else:
        print_line(f"key {revoked.id} of {revoked.operator} is revoked")


def parse_operator_role(text: str) -> OperatorRole:
    """Return the role of a text. Raises ConfigError."""
    try:
        return OperatorRole(text)
    except ValueError:
        raise ConfigError(f"role {text[:40]!r}: expected {', '.join(OperatorRole)}") from None


def print_link(link: OperatorLink, *, as_json: bool) -> None:
    """Print a link that signs in once."""
    if as_json:
        print_json(link)
        return
    hint = "" if "://" in link.link else " at the address of the console (fleet up --console)"
    until = format_time(link.expires_at)
    print_line(f"{link.name} signs in with this link{hint}, once, until {until}:")
    print_line(f"  {link.link}")


def _table(title: str, headers: tuple[str, ...]) -> FittedTable:
    table = FittedTable(title=title, title_justify="left")
    for header in headers:
        table.add_column(header, overflow="fold")
    return table
