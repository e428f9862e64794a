"""How answers and counts look: coloured by source in a terminal, plain in a pipe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fleet.identity.enrolment import tag_words
from fleet.protocol.modes import CLOUD, FALLBACK, LOOKUP, offload_rate
from fleet.protocol.prompt import Reply, Usage

EXIT_STYLES: Final = ("green", "cyan", "blue", "bright_green")
STYLES: Final = {LOOKUP: "bright_cyan", CLOUD: "magenta", FALLBACK: "yellow"}
BAR_WIDTH: Final = 18
TIMES: Final = ("_at", "_seen", "_after")
HEADERS: Final = {
    "generations": "answers",
    "sources": "where tokens came from",
    "offload_rate": "offload",
    "bytes_up": "up, B",
    "bytes_down": "down, B",
}


def source_style(source: str, exits: Sequence[str]) -> str:
    """The colour of a source; exits take theirs in order of depth, one that is not among them the first."""
    return (
        STYLES.get(source)
        or EXIT_STYLES[exits.index(source) % len(EXIT_STYLES) if source in exits else 0]
    )


def exits_of(sources: Iterable[str]) -> list[str]:
    """The exits among `sources`, shallow ones first."""
    return sorted({s for s in sources if s not in STYLES}, key=lambda s: int(s.split(":")[1]))


def legend(sources: Iterable[str]) -> Text:
    """The sources' names, each in its colour."""
    exits = exits_of(sources)
    return Text("  ").join(Text(f"■ {s}", source_style(s, exits)) for s in (*exits, *STYLES))


def source_bar(sources: Mapping[str, int]) -> Text:
    """Shares of the sources as a coloured bar."""
    total = sum(sources.values())
    exits = exits_of(sources)
    bar = Text()
    drawn = 0
    seen = 0
    for source in (*exits, *STYLES):
        seen += sources.get(source, 0)
        end = round(BAR_WIDTH * seen / total) if total else 0
        bar.append("█" * (end - drawn), source_style(source, exits))
        drawn = end
    return bar


def sources_text(sources: Mapping[str, int]) -> str:
    return "  ".join(f"{source} {count}" for source, count in sources.items())


def print_reply(console: Console, reply: Reply, exits: Sequence[str]) -> None:
    """Prints a reply's text where the last one ended, in the colour of its source."""
    style = source_style(reply.source, exits) if reply.source else ""
    console.print(Text(reply.text, style), end="", soft_wrap=True)


def usage_line(usage: Usage, note: str | None) -> Text:
    """One dim line under an answer."""
    line = (
        f"{usage.tokens} tokens: {sources_text(usage.sources)}; offload {offload_rate(usage.sources):.0%}; "
        f"up {usage.bytes_up:,} B, down {usage.bytes_down:,} B; "
        f"{usage.round_trips} round trips; first token {usage.ttft_ms:.0f} ms, then {usage.tpot_ms:.0f} ms a token"
    )
    switches = "".join(f"; from token {s.token} on {s.mode}: {s.reason}" for s in usage.switches)
    return Text(f"[{line}{switches}{'; ' + note if note else ''}]", "dim")


def print_rows(console: Console, rows: Sequence[Any], title: str, *, as_json: bool) -> None:
    """Rows (msgspec structs of one type) as a table, or as one JSON array."""
    if as_json:
        print(msgspec.json.encode(rows).decode())
        return
    if not rows:
        console.print(f"{title}: none yet")
        return
    table = Table(title=title, title_justify="left")
    fields = rows[0].__struct_fields__
    for name in fields:
        numeric = isinstance(getattr(rows[0], name), int | float) and not name.endswith(TIMES)
        table.add_column(
            HEADERS.get(name, name.replace("_", " ")), justify="right" if numeric else "left"
        )
    for row in rows:
        table.add_row(*(_cell(name, getattr(row, name)) for name in fields))
    console.print(table)


def _cell(name: str, value: object) -> str | Text:
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case dict() if name == "tags":
            return ", ".join(tag_words(value)) or "-"
        case dict():
            exits = exits_of(value)
            counts = Text("  ").join(
                Text(f"{s} {n:,}", source_style(s, exits)) for s, n in value.items()
            )
            return Text("\n").join((source_bar(value), counts)) if value else "-"
        case float() if name.endswith(TIMES):
            return datetime.fromtimestamp(value, UTC).strftime("%Y-%m-%d %H:%M:%S")
        case float() if name.endswith("rate"):
            return f"{value:.1%}"
        case float():
            return f"{value:.1f}"
        case int():
            return f"{value:,}"
        case datetime():
            return value.strftime("%Y-%m-%d %H:%M:%S")
        case tuple() | list():
            return ", ".join(map(str, value)) or "-"
    return str(value)
