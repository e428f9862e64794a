"""`fleet audit`: the changes to the fleet, each with its time and actor."""

from __future__ import annotations

from typing import Annotated

import msgspec
import typer
from msgspec import Struct

from fleet.cli.console import new_console
from fleet.cli.options import (
    MAX_ROWS,
    HomeOption,
    JsonOption,
    SinceOption,
    parse_since,
    print_json,
)
from fleet.cli.views import print_rows
from fleet.registry.results import AuditRow
from fleet.server.home import FleetHome

SubjectArgument = Annotated[
    str | None, typer.Argument(help="Only of this device, app, group or bundle.")
]
LimitOption = Annotated[int, typer.Option(min=1, max=MAX_ROWS, help="Maximum number of changes.")]


class AuditLine(Struct, frozen=True, kw_only=True):
    """A change as the table shows it."""

    changed_at: float
    actor: str
    action: str
    subject: str
    details: str


def list_changes(
    subject: SubjectArgument = None,
    since: SinceOption = None,
    limit: LimitOption = 50,
    folder: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the latest changes to the fleet, newest first."""
    with FleetHome.load(folder).registry() as registry:
        rows = registry.audit_log.entries(subject, parse_since(since), limit)
    if as_json:
        print_json(rows)
    else:
        print_rows(new_console(), [_line(row) for row in rows], "changes", as_json=False)


def _line(row: AuditRow) -> AuditLine:
    values = {key: value for key, value in row.details.items() if value not in (None, [], {}, "")}
    words = [f"{key}={msgspec.json.encode(value).decode()}" for key, value in values.items()]
    return AuditLine(
        changed_at=row.at,
        actor=row.actor,
        action=row.action,
        subject=row.subject,
        details=" ".join(words),
    )
