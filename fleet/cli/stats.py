"""`fleet stats`: sources of tokens, latency, and changes of the mode."""

from __future__ import annotations

import gc
import time
from typing import TYPE_CHECKING, Annotated, Literal

import typer

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
from fleet.protocol.types import DAY_S
from fleet.registry.results import HourStats
from fleet.server.home import FleetHome
from fleet.utils.console import new_console
from fleet.utils.optional_imports import needs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fleet.registry.results import StatsCounts

Subject = Literal["device", "group", "bundle", "hour"]
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
    home = FleetHome.load(folder)
    since_at = parse_since(since)
    rows = read_stats(home, by, device, since_at, group)
    if plot is not None:
        plot_stats(rows, plot, since_at or first_hour(home), time.time())
    if as_csv:
        print(stats_csv(rows), end="")
    elif as_json:
        print_json(rows)
    else:
        print_stats(new_console(), rows, f"tokens by {by}" + (f" since {since}" if since else ""))


def read_stats(
    home: FleetHome, by: Subject, device: str | None, since: float | None, group: str | None
) -> Sequence[StatsCounts]:
    """Read the rows from the registry; `since` is in seconds since 1970."""
    now = time.time()
    with home.registry() as registry:
        # A garbage collection among many rows need not visit the loaded modules (60 ms).
        gc.freeze()
        if by == "device":
            return registry.stats.per_device(device, since, group=group, now=now)
        from fleet.registry.stats.queries import By

        if by == "hour" and since is None:
            since = now - DAY_S
        return registry.stats.grouped(By(by), device, since, group=group, now=now)


def first_hour(home: FleetHome) -> float:
    """Return the begin of the first hour with answers, in seconds since 1970; now without any."""
    from fleet.registry.stats.queries import By

    now = time.time()
    with home.registry() as registry:
        hours = registry.stats.grouped(By.HOUR, None, None, group=None, now=now)
    return min((each.hour_at for each in hours if isinstance(each, HourStats)), default=now)
