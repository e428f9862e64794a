"""`fleet stats`: sources of tokens, latency, and changes of the mode."""

from __future__ import annotations

import gc
import time
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer

from fleet.cli.access import fleet_access
from fleet.cli.options import (
    GroupOption,
    HomeOption,
    JsonOption,
    OnlyDeviceArgument,
    PlotOption,
    SinceOption,
    parse_since,
    print_json,
)
from fleet.cli.stats_views import print_stats, stats_csv
from fleet.errors import ConfigError
from fleet.operator_api.operation import Operation
from fleet.operator_api.paging import MAX_PAGE, walk_pages
from fleet.operator_api.stats_operations import (
    LIST_BUNDLE_STATS,
    LIST_DEVICE_STATS,
    LIST_GROUP_STATS,
    LIST_HOUR_STATS,
    StatsWindow,
)
from fleet.utils.console import new_console
from fleet.utils.optional_imports import needs

if TYPE_CHECKING:
    from fleet.operator_api.fleet_access import FleetAccess
    from fleet.registry.results import StatsCounts

Subject = Literal["device", "group", "bundle", "hour"]
OPERATION_BY: Final[dict[Subject, Operation[StatsWindow, Any]]] = {
    "device": LIST_DEVICE_STATS,
    "group": LIST_GROUP_STATS,
    "bundle": LIST_BUNDLE_STATS,
    "hour": LIST_HOUR_STATS,
}
ByOption = Annotated[Subject, typer.Option("--by", help="Subject of a row.")]


def stats(
    device: OnlyDeviceArgument = None,
    by: ByOption = "device",
    since: SinceOption = None,
    group: GroupOption = None,
    plot: PlotOption = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    folder: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show sources of tokens, latency and changes of mode; by the hour, of the last day."""
    if as_csv and as_json:
        raise ConfigError("--csv and --json exclude each other; give one of them")
    if plot is not None:
        with needs("plots"):
            from fleet.cli.stats_plot import plot_stats
            from fleet.utils.plots import check_plot
        check_plot(plot)
    since_at = parse_since(since)
    with fleet_access(folder) as access:
        window = StatsWindow(device=device, since=since_at, group=group, limit=MAX_PAGE)
        rows = read_stats(access, by, window)
        first_at = since_at or (first_hour(access) if plot is not None else 0.0)
    if plot is not None:
        plot_stats(rows, plot, first_at, time.time())
    if as_csv:
        print(stats_csv(rows), end="")
    elif as_json:
        print_json(rows)
    else:
        print_stats(new_console(), rows, f"tokens by {by}" + (f" since {since}" if since else ""))


def read_stats(access: FleetAccess, by: Subject, window: StatsWindow) -> list[StatsCounts]:
    """Read all rows of a window."""
    # A garbage collection among many rows need not visit the loaded modules (60 ms).
    gc.freeze()
    return [row for page in walk_pages(access, OPERATION_BY[by], window) for row in page.rows]


def first_hour(access: FleetAccess) -> float:
    """Return the begin of the first hour with answers, in seconds since 1970; now without any."""
    first = access.call(LIST_HOUR_STATS, StatsWindow(since=0.0, limit=1)).rows
    return first[0].hour_at if first else time.time()
