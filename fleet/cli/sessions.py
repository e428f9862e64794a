"""`fleet sessions`: the latest sessions between devices and workers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console

from fleet.cli.access import fleet_access, latest_rows
from fleet.cli.options import (
    MAX_ROWS,
    TO_THE_SECOND,
    HomeOption,
    JsonOption,
    OnlyDeviceArgument,
    format_time,
    print_json,
)
from fleet.cli.views import cell_of, lines_table
from fleet.operator_api.paging import MAX_PAGE, walk_pages
from fleet.operator_api.stats_operations import LIST_SESSIONS, SessionQuery
from fleet.registry.results import SessionRow
from fleet.utils.console import new_console
from fleet.utils.printable import count


def sessions(
    device: OnlyDeviceArgument = None,
    limit: Annotated[int, typer.Option(min=1, max=MAX_ROWS, help="Maximum number.")] = 50,
    folder: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the latest sessions between devices and workers."""
    query = SessionQuery(device=device, limit=min(limit, MAX_PAGE))
    with fleet_access(folder) as access:
        pages = walk_pages(access, LIST_SESSIONS, query)
        rows = latest_rows((page.sessions for page in pages), limit)
    if as_json:
        print_json(rows)
    else:
        print_sessions(new_console(), rows, "sessions")


def print_sessions(console: Console, rows: Sequence[SessionRow], title: str) -> None:
    """Print sessions as a table that fits a terminal; `--json` has the whole ids."""
    table = lines_table(title, ("session, opened (UTC)", "device, worker", "answers", "bytes"))
    for row in rows:
        table.add_row(
            cell_of(row.session[:8], format_time(row.opened_at, TO_THE_SECOND)),
            cell_of(row.device, row.worker or "-"),
            cell_of(count(row.generations, "answer"), count(row.tokens, "token")),
            cell_of(f"up {row.bytes_up:,}", f"down {row.bytes_down:,}"),
        )
    console.print(table if rows else f"{title}: none yet")
