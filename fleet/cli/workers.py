"""`fleet workers`: the workers of the fleet."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from fleet.cli.access import call_fleet
from fleet.cli.options import HomeOption, JsonOption, format_time, print_json
from fleet.cli.views import cell_of, lines_table
from fleet.operator_api.operation import NoFields
from fleet.operator_api.stats_operations import LIST_WORKERS
from fleet.registry.results import WorkerRow
from fleet.utils.console import new_console
from fleet.utils.printable import count


def workers(folder: HomeOption = None, as_json: JsonOption = False) -> None:
    """List the workers: online or not, draining, bundles, number of sessions."""
    rows = call_fleet(folder, LIST_WORKERS, NoFields()).workers
    if as_json:
        print_json(rows)
    else:
        print_workers(new_console(), rows)


def print_workers(console: Console, rows: Sequence[WorkerRow]) -> None:
    """Print workers as a table that fits a terminal; `--json` has the whole ids."""
    table = lines_table("workers", ("worker", "state", "bundles", "version"))
    for row in rows:
        state = "draining" if row.draining else "online"
        seen = format_time(row.last_seen)
        table.add_row(
            cell_of(row.worker, count(row.num_sessions, "session")),
            cell_of(state if row.online else "offline", f"seen {seen}"),
            cell_of(*(bundle_id[:8] for bundle_id in row.bundle_ids)),
            cell_of(row.version),
        )
    console.print(table if rows else "workers: none yet")
