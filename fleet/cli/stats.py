"""`fleet stats`, `fleet devices` and `fleet device`: what operators see."""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
import typer
from rich.console import Console

from fleet.errors import ConfigError
from fleet.identity.enrolment import tag_words
from fleet.server.home import FleetHome
from fleet.utils.optional_imports import load

NUM_SESSIONS: Final = 5
DAY_S: Final = 86_400

StateOption = Annotated[
    Path | None, typer.Option("--home", help="The fleet's folder (default: $FLEET_HOME).")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
GroupOption = Annotated[str | None, typer.Option("--group", help="Only the devices of this group.")]
ByOption = Annotated[
    Literal["device", "group", "bundle", "hour"], typer.Option("--by", help="What a row is about.")
]
SinceOption = Annotated[str | None, typer.Option(help="For example 30m, 24h, 7d, or 2026-01-31.")]


def stats(
    device: Annotated[str | None, typer.Argument()] = None,
    by: ByOption = "device",
    since: SinceOption = None,
    group: GroupOption = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw it into this file, *.png or *.svg.")
    ] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV instead of tables.")] = False,
    state: StateOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show where tokens came from, how fast and why modes changed; by the hour it is of the last day."""
    from fleet.cli.stats_views import print_stats, stats_csv

    if as_csv and as_json:
        raise ConfigError("--csv and --json exclude each other; give one of them")
    if plot is not None:
        load("fleet.utils.plots").check_plot(plot)
    began = parse_since(since)
    now = time.time()
    with FleetHome.load(state or FleetHome.default_folder()).registry() as registry:
        gc.freeze()  # what is loaded stays: a garbage collection among many rows need not go through it (60 ms)
        if by == "device":
            rows: Sequence[Any] = registry.stats(device, began, group=group, now=now)
        else:
            if by == "hour" and began is None:
                began = now - DAY_S
            rows = registry.stats_by(
                load("fleet.registry.stats.queries").By(by), device, began, group=group, now=now
            )
    if plot is not None:
        load("fleet.cli.stats_plot").plot_stats(rows, plot)
    if as_csv:
        print(stats_csv(rows), end="")
    elif as_json:
        print(msgspec.json.encode(rows).decode())
    else:
        print_stats(Console(), rows, f"tokens by {by}" + (f" since {since}" if since else ""))


def devices(
    group: GroupOption = None,
    online: Annotated[
        bool | None, typer.Option("--online/--offline", help="Only those that are.")
    ] = None,
    tag: Annotated[
        str | None, typer.Option(help="Only those that have this tag, like floor=1.")
    ] = None,
    state: Annotated[
        str | None, typer.Option(help="Only those that are pending, active, revoked, ...")
    ] = None,
    home: StateOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the devices: online or not, bundle, last seen."""
    from fleet.cli.stats_views import print_devices

    with FleetHome.load(home or FleetHome.default_folder()).registry() as registry:
        rows = [
            row
            for row in registry.devices()
            if (group is None or row.group == group)
            and (online is None or row.online == online)
            and (tag is None or tag in tag_words(row.tags))
            and (state is None or row.state == state)
        ]
    if as_json:
        print(msgspec.json.encode(rows).decode())
    else:
        print_devices(Console(), rows)


def workers(state: StateOption = None, as_json: JsonOption = False) -> None:
    """List the workers: online or not, draining, which bundles, how many sessions."""
    from fleet.cli.views import print_rows

    with FleetHome.load(state or FleetHome.default_folder()).registry() as registry:
        print_rows(Console(), registry.workers(), "workers", as_json=as_json)


def device(
    name: Annotated[str, typer.Argument()],
    since: SinceOption = None,
    state: StateOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show one device in detail: what it said last, its counts and its latest sessions."""
    from fleet.cli.stats_views import print_devices, print_stats
    from fleet.cli.views import print_rows

    with FleetHome.load(state or FleetHome.default_folder()).registry() as registry:
        (counts,) = registry.stats(name, parse_since(since))
        row = registry.device(name)
        sessions = registry.sessions(name, NUM_SESSIONS)
    if as_json:
        print(msgspec.json.encode({"device": row, "stats": counts, "sessions": sessions}).decode())
        return
    console = Console()
    print_devices(console, [row])
    print_stats(console, [counts], "answers")
    for reason, times in counts.switches.items():
        console.print(f"{times:,} times {reason}", highlight=False)
    print_rows(console, sessions, "latest sessions", as_json=False)


def parse_since(value: str | None) -> float | None:
    """Seconds since 1970 of "30m", "24h", "7d" ago, or of an ISO date; raises ConfigError."""
    if value is None:
        return None
    if (span_s := parse_span(value)) is not None:
        return time.time() - span_s
    try:
        return datetime.fromisoformat(value).timestamp()
    except ValueError:
        raise ConfigError(
            f"since {value!r}: expected a span like 30m, 24h, 7d, or a date like 2026-01-31"
        ) from None


def parse_span(value: str) -> float | None:
    """Seconds of a span like "90s", "30m", "24h" or "7d"; None when it is none."""
    match = re.fullmatch(r"(\d+)([smhd])", value)
    return int(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": DAY_S}[match[2]] if match else None
