"""How statistics look: a table with bars, or rows of CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fleet.cli.views import exits_of, source_bar, source_style
from fleet.identity.enrolment import tag_words

LEVELS: Final = "▁▂▃▄▅▆▇█"
KEYS: Final = ("device", "group", "bundle_id", "hour_at")
MAX_REASONS: Final = 3


def spark(rates: Sequence[float | None]) -> str:
    """Rates from 0 to 1 as a small bar chart, a dot where there is none."""
    return "".join("·" if rate is None else LEVELS[min(7, int(rate * 8))] for rate in rates)


def key_of(row: Any) -> str:
    """What a row is about, as text."""
    value = next(getattr(row, name) for name in KEYS if name in row.__struct_fields__)
    return _time(value) if isinstance(value, float) else value or "-"


def print_stats(console: Console, rows: Sequence[Any], title: str) -> None:
    """Rows of statistics, of one kind, as a table."""
    if not rows:
        console.print(f"{title}: none yet")
        return
    table = Table(title=title, title_justify="left", show_lines=True)
    about = next(name for name in KEYS if name in rows[0].__struct_fields__)
    table.add_column(about.removesuffix("_id").removesuffix("_at"), overflow="fold")
    table.add_column("where tokens came from")
    table.add_column("p50, p95, bytes", no_wrap=True)
    for row in rows:
        table.add_row(_name(row), _sources(row), _costs(row))
    console.print(table)


def print_devices(console: Console, rows: Sequence[Any]) -> None:
    """Devices as a table that fits a terminal; `--json` has every field."""
    if not rows:
        console.print("devices: none yet; enrol one with 'fleet enroll NAME'")
        return
    table = Table(title="devices", title_justify="left", show_lines=True)
    for header in ("device", "state", "serves", "configuration", "certificate ends"):
        table.add_column(header, overflow="fold")
    for row in rows:
        seen = (
            Text("online", "green") if row.online else Text(f"seen {_time(row.last_seen)}", "dim")
        )
        belongs = [Text(word, "dim") for word in (row.group, " ".join(tag_words(row.tags))) if word]
        followed = Text(f"version {row.config_version}" if row.config_version else "its own")
        problem = [Text(row.config_error, "red")] if row.config_error else []
        table.add_row(
            Text("\n").join((Text(row.device, "bold"), *belongs)),
            Text("\n").join((Text(row.state), seen)),
            Text("\n").join((Text(row.mode or "-"), Text(row.bundle_id[:8], "dim"))),
            Text("\n").join((followed, *problem)),
            _time(row.not_after or None),
        )
    console.print(table)


def stats_csv(rows: Sequence[Any]) -> str:
    """A header and one line a row; tokens by source in a column each, switches as their number, no trend."""
    sources = list(dict.fromkeys(source for row in rows for source in row.sources))
    exits = exits_of(sources)
    ordered = [*exits, *(source for source in sources if source not in exits)]
    out = io.StringIO()
    names = [name for name in (rows[0].__struct_fields__ if rows else ()) if name not in _NESTED]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*sorted(names, key=lambda name: name not in KEYS), "switches", *ordered])
    for row in rows:
        values = msgspec.structs.asdict(row)
        scalars = [values[name] for name in sorted(names, key=lambda name: name not in KEYS)]
        writer.writerow(
            [
                *scalars,
                sum(row.switches.values()),
                *(row.sources.get(source, 0) for source in ordered),
            ]
        )
    return out.getvalue()


_NESTED: Final = ("sources", "shares", "switches", "trend")


def _name(row: Any) -> Text:
    """The row's key and its answers; of a device also whether it is there."""
    lines = [Text(key_of(row), "bold")]
    if "last_seen" in row.__struct_fields__:
        lines.append(
            Text("online", "green") if row.online else Text(f"seen {_time(row.last_seen)}", "dim")
        )
    return Text("\n").join(
        (*lines, Text(f"{row.generations:,} answers"), Text(f"{row.tokens:,} tokens"))
    )


def _sources(row: Any) -> Text:
    """A bar with its figures, the offload rate with its trend, and why the mode changed most often."""
    if not row.tokens:
        return Text("-")
    exits = exits_of(row.sources)
    shares = Text("  ").join(
        Text(f"{source} {tokens:,} ({row.shares[source]:.1%})", source_style(source, exits))
        for source, tokens in row.sources.items()
    )
    reasons = [
        Text(f"{n:,} times {reason}", "dim")
        for reason, n in list(row.switches.items())[:MAX_REASONS]
    ]
    offload = Text(
        f"offload {row.offload_rate:.1%}" + (f", trend\n{spark(row.trend)}" if row.trend else "")
    )
    return Text("\n").join((source_bar(row.sources), shares, offload, *reasons))


def _costs(row: Any) -> str:
    times = [
        ("first token", row.ttft_p50_ms, row.ttft_p95_ms),
        ("per token", row.tpot_p50_ms, row.tpot_p95_ms),
    ]
    lines = [f"{what} {p50:,.0f}, {p95:,.0f} ms" for what, p50, p95 in times if p50 is not None]
    return "\n".join([*lines, f"up {row.bytes_up:,} B", f"down {row.bytes_down:,} B"])


def _time(at: float | None) -> str:
    return "never" if at is None else datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M")
