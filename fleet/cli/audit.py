"""`fleet audit`: the changes to the fleet, each with its time and actor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec
import typer
from rich.console import Console

from fleet.cli.access import fleet_access, latest_rows
from fleet.cli.options import (
    MAX_ROWS,
    TO_THE_SECOND,
    HomeOption,
    JsonOption,
    SinceOption,
    format_time,
    parse_since,
    print_json,
)
from fleet.cli.views import cell_of, lines_table
from fleet.operator_api.audit_operations import LIST_CHANGES, AuditQuery
from fleet.operator_api.paging import MAX_PAGE, walk_pages
from fleet.registry.results import AuditRow
from fleet.utils.console import new_console

SubjectArgument = Annotated[
    str | None, typer.Argument(help="Only of this device, app, group or bundle.")
]
LimitOption = Annotated[int, typer.Option(min=1, max=MAX_ROWS, help="Maximum number of changes.")]


def list_changes(
    subject: SubjectArgument = None,
    since: SinceOption = None,
    limit: LimitOption = 50,
    folder: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the latest changes to the fleet, newest first."""
    query = AuditQuery(subject=subject, since=parse_since(since), limit=min(limit, MAX_PAGE))
    with fleet_access(folder) as access:
        pages = walk_pages(access, LIST_CHANGES, query)
        rows = latest_rows((page.changes for page in pages), limit)
    if as_json:
        print_json(rows)
    else:
        print_changes(new_console(), rows)


def print_changes(console: Console, rows: Sequence[AuditRow]) -> None:
    """Print changes as a table that fits a terminal."""
    table = lines_table("changes", ("time, UTC, and actor", "change", "details"))
    for row in rows:
        table.add_row(
            cell_of(format_time(row.at, TO_THE_SECOND), row.actor),
            cell_of(row.action, row.subject),
            cell_of(*_details(row)),
        )
    console.print(table if rows else "changes: none yet")


def _details(row: AuditRow) -> list[str]:
    values = {key: value for key, value in row.details.items() if value not in (None, [], {}, "")}
    return [f"{key}={msgspec.json.encode(value).decode()}" for key, value in values.items()]
