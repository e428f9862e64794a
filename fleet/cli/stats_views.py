"""Presentation of statistics: a table with bars, or rows of CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Final

import msgspec
from rich.console import Console, RenderableType
from rich.text import Text

from fleet.cli.fitted_table import FittedTable
from fleet.cli.options import format_time
from fleet.cli.views import exits_of, source_bar, source_style
from fleet.identity.enrolment import format_tags
from fleet.registry.results import BundleStats, DeviceRow, StatsCounts, StatsRow, bundle_label
from fleet.utils.console import outside_text
from fleet.utils.printable import count

LEVELS: Final = "▁▂▃▄▅▆▇█"
KEYS: Final = ("device", "group", "bundle_id", "hour_at")
NESTED: Final = ("sources", "shares", "switches", "trend")
MAX_REASONS: Final = 3


def spark(rates: Sequence[float | None]) -> str:
    """Rates from 0 to 1 as a small bar chart, a dot for each None."""
    return "".join("·" if rate is None else LEVELS[min(7, int(rate * 8))] for rate in rates)


def key_name(row: StatsCounts) -> str:
    """The field that names the subject of a row."""
    return next(name for name in KEYS if name in row.__struct_fields__)


def key_of(row: StatsCounts) -> str:
    """The subject of a row, as text."""
    if isinstance(row, BundleStats):
        return bundle_label(row.bundle_id, row.bundle_name)
    value: str | float | None = getattr(row, key_name(row))
    return format_time(value) if isinstance(value, float) else value or "-"


def print_stats(console: Console, rows: Sequence[StatsCounts], title: str) -> None:
    """Print rows of statistics, of one kind, as a table."""
    console.print(stats_table(rows, title))


def stats_table(rows: Sequence[StatsCounts], title: str) -> RenderableType:
    """Rows of statistics, of one kind, as a table."""
    if not rows:
        return f"{title}: none yet"
    table = FittedTable(title=title, title_justify="left", show_lines=True)
    table.add_column(key_name(rows[0]).removesuffix("_id").removesuffix("_at"), overflow="fold")
    table.add_column("token sources")
    table.add_column("p50, p95, bytes", no_wrap=True)
    for row in rows:
        table.add_row(_name(row), _sources(row), _costs(row))
    return table


def print_devices(console: Console, rows: Sequence[DeviceRow]) -> None:
    """Print devices as a table that fits a terminal; `--json` has every field."""
    table = FittedTable(title="devices", title_justify="left", show_lines=True)
    for header in ("device", "state", "serves", "configuration", "certificate ends"):
        table.add_column(header, overflow="fold")
    for row in rows:
        table.add_row(*_device_cells(row))
    console.print(table)


def _device_cells(row: DeviceRow) -> list[Text]:
    labels = [label for label in (row.group, " ".join(format_tags(row.tags))) if label]
    version = f"version {row.config_version}" if row.config_version else "its own"
    errors = [each for each in (row.config_error, row.software_error, row.event_error) if each]
    problems = [outside_text(each.message, "red") for each in errors]
    return [
        _lines(outside_text(row.device, "bold"), *(outside_text(each, "dim") for each in labels)),
        _lines(outside_text(row.state), _presence(row)),
        _lines(
            outside_text(row.mode or "-"),
            outside_text(row.bundle_name or row.bundle_id[:8], "dim"),
        ),
        _lines(Text(version), *problems),
        Text(format_time(row.not_after or None)),
    ]


def _presence(row: DeviceRow | StatsRow) -> Text:
    if row.online:
        return Text("online", "green")
    return Text(f"seen {format_time(row.last_seen)}", "dim")


def _lines(*lines: Text) -> Text:
    return Text("\n").join(lines)


def stats_csv(rows: Sequence[StatsCounts]) -> str:
    """A header and one line a row.

    Tokens have a column for each source; switches are their number; the trend is left out.
    """
    sources = list(dict.fromkeys(source for row in rows for source in row.sources))
    exits = exits_of(sources)
    ordered = [*exits, *(source for source in sources if source not in exits)]
    fields = rows[0].__struct_fields__ if rows else ()
    names = sorted(
        set(fields) - set(NESTED), key=lambda name: (name not in KEYS, fields.index(name))
    )
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*names, "switches", *ordered])
    for row in rows:
        values = msgspec.structs.asdict(row)
        counts = [row.sources.get(source, 0) for source in ordered]
        writer.writerow([*(values[name] for name in names), sum(row.switches.values()), *counts])
    return out.getvalue()


def _name(row: StatsCounts) -> Text:
    """The row's subject and its answers; for a device also its last status."""
    lines = [outside_text(key_of(row), "bold")]
    if isinstance(row, StatsRow):
        lines.append(_presence(row))
    return _lines(*lines, Text(count(row.generations, "answer")), Text(count(row.tokens, "token")))


def _sources(row: StatsCounts) -> Text:
    """A bar with its figures, the offload rate with its trend, and the most frequent switches."""
    if not row.tokens:
        return Text("-")
    exits = exits_of(row.sources)
    shares = [
        outside_text(f"{source} {tokens:,} ({row.shares[source]:.1%})", source_style(source, exits))
        for source, tokens in row.sources.items()
    ]
    offload = f"offload {row.offload_rate:.1%}"
    if sum(rate is not None for rate in row.trend) > 1:
        offload += f", trend\n{spark(row.trend)}"
    most_frequent = list(row.switches.items())[:MAX_REASONS]
    reasons = [outside_text(switch_text(*each), "dim") for each in most_frequent]
    return _lines(source_bar(row.sources), Text("  ").join(shares), Text(offload), *reasons)


def switch_text(reason: str, times: int) -> str:
    """The number of switches to a mode, with its reason: "2 times standalone: ..."."""
    return f"{count(times, 'time')} {reason}"


def _costs(row: StatsCounts) -> str:
    lines = [f"up {row.bytes_up:,} B", f"down {row.bytes_down:,} B"]
    if row.tpot_p50_ms is not None and row.tpot_p95_ms is not None:
        lines.insert(0, f"per token {row.tpot_p50_ms:,.0f}, {row.tpot_p95_ms:,.0f} ms")
    if row.ttft_p50_ms is not None and row.ttft_p95_ms is not None:
        lines.insert(0, f"first token {row.ttft_p50_ms:,.0f}, {row.ttft_p95_ms:,.0f} ms")
    return "\n".join(lines)
