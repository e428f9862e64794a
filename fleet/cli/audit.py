"""`fleet audit`: every change, who made it and when."""

from __future__ import annotations

from typing import Annotated

import msgspec
import typer
from msgspec import Struct
from rich.console import Console

from fleet.cli.stats import JsonOption, SinceOption, StateOption, parse_since
from fleet.server.home import FleetHome


class Line(Struct, frozen=True, kw_only=True):
    """An entry as it is shown."""

    changed_at: float
    actor: str
    action: str
    subject: str
    what: str


def audit(
    subject: Annotated[
        str | None, typer.Argument(help="Only of this device, app, group or bundle.")
    ] = None,
    since: SinceOption = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many, the newest.")] = 50,
    state: StateOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the latest changes to the fleet, newest first."""
    from fleet.cli.views import print_rows

    with FleetHome.load(state or FleetHome.default_folder()).registry() as registry:
        rows = registry.audit_log(subject, parse_since(since), limit)
    if as_json:
        print(msgspec.json.encode(rows).decode())
        return
    lines = [
        Line(
            changed_at=row.at,
            actor=row.actor,
            action=row.action,
            subject=row.subject,
            what=_in_words(row.details),
        )
        for row in rows
    ]
    print_rows(Console(), lines, "changes", as_json=False)


def _in_words(details: dict[str, object]) -> str:
    said = {key: value for key, value in details.items() if value not in (None, [], {}, "")}
    return " ".join(f"{key}={msgspec.json.encode(value).decode()}" for key, value in said.items())
