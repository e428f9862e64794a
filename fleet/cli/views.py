"""Presentation of responses and rows: coloured by source in a terminal, plain in a pipe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from msgspec import Struct
from rich.console import Console
from rich.text import Text

from fleet.cli.fitted_table import FittedTable
from fleet.cli.options import TO_THE_SECOND, format_time, print_json
from fleet.identity.enrolment import format_tags
from fleet.protocol.modes import CLOUD, FALLBACK, LOOKUP, Mode, offload_rate
from fleet.protocol.prompt import Reply, TokenLogprob, Usage
from fleet.protocol.report import ConfigProblem
from fleet.utils.console import outside_text
from fleet.utils.printable import count

EXIT_STYLES: Final = ("green", "cyan", "blue", "bright_green")
STYLES: Final = {LOOKUP: "bright_cyan", CLOUD: "magenta", FALLBACK: "yellow"}
BAR_WIDTH: Final = 18
TIMES: Final = ("_at", "_seen", "_after")
HEADERS: Final = {
    "generations": "answers",
    "sources": "token sources",
    "offload_rate": "offload",
    "bytes_up": "up, B",
    "bytes_down": "down, B",
}


def source_style(source: str, exits: Sequence[str]) -> str:
    """The colour of a source; `exits` are in order of depth, others have the first colour."""
    if source in STYLES:
        return STYLES[source]
    position = exits.index(source) if source in exits else 0
    return EXIT_STYLES[position % len(EXIT_STYLES)]


def exits_of(sources: Iterable[str]) -> list[str]:
    """The exits among `sources`, in order of depth."""
    exits = {source for source in sources if source not in STYLES}
    return sorted(exits, key=_depth)


def _depth(source: str) -> int:
    """The layer in ``exit:<layer>``; 0 for another source, which only a faulty device reports."""
    layer = source.rpartition(":")[2]
    return int(layer) if layer.isdecimal() else 0


def legend(sources: Iterable[str]) -> Text:
    """The names of the sources, each in its colour."""
    exits = exits_of(sources)
    return Text("  ").join(Text(f"■ {s}", source_style(s, exits)) for s in (*exits, *STYLES))


def source_bar(sources: Mapping[str, int]) -> Text:
    """Shares of the sources as a coloured bar."""
    total = sum(sources.values())
    exits = exits_of(sources)
    bar = Text()
    drawn = 0
    num_tokens = 0
    for source in (*exits, *STYLES):
        num_tokens += sources.get(source, 0)
        end = round(BAR_WIDTH * num_tokens / total) if total else 0
        bar.append("█" * (end - drawn), source_style(source, exits))
        drawn = end
    return bar


def numbers_table(title: str, headers: Iterable[str]) -> FittedTable:
    """An empty table with right-aligned columns."""
    table = FittedTable(title=title)
    for header in headers:
        table.add_column(header, justify="right")
    return table


def sources_text(sources: Mapping[str, int]) -> str:
    return "  ".join(f"{source} {count}" for source, count in sources.items())


def reply_text(reply: Reply, exits: Sequence[str]) -> Text:
    """The text of a reply in the colour of its source, or its choices with their numbers."""
    if reply.choices:
        lines = [f"{choice.index + 1}: {choice.full_text or ''}" for choice in reply.choices]
        return outside_text("\n".join(lines))
    return outside_text(reply.text, source_style(reply.source, exits) if reply.source else "")


def logprobs_of(replies: Iterable[Reply]) -> tuple[TokenLogprob, ...]:
    """Return the tokens with their log-probabilities that the replies have."""
    return tuple(each for reply in replies for each in reply.logprobs or ())


def logprob_tables(replies: Sequence[Reply]) -> list[FittedTable]:
    """Return a table of the log-probabilities of a response, or of each of its choices."""
    tokens_by_title = {
        f"choice {choice.index + 1}": choice.logprobs or () for choice in replies[-1].choices or ()
    } or {"log-probabilities": logprobs_of(replies)}
    return [_logprob_table(title, tokens) for title, tokens in tokens_by_title.items() if tokens]


def _logprob_table(title: str, tokens: Sequence[TokenLogprob]) -> FittedTable:
    table = FittedTable(title=title, title_justify="left")
    table.add_column("token")
    table.add_column("log-probability", justify="right")
    if any(token.top for token in tokens):
        table.add_column("best tokens", overflow="fold")
    for token in tokens:
        best = "  ".join(f"{top.token!r} {top.logprob:.3f}" for top in token.top)
        cells = [repr(token.token), f"{token.logprob:.3f}", best][: len(table.columns)]
        table.add_row(*map(outside_text, cells))
    return table


def usage_line(usage: Usage, note: str | None) -> Text:
    """One dim line of counts for under a response."""
    words = [
        f"{count(usage.tokens, 'token')}: {sources_text(usage.sources)}",
        f"offload {offload_rate(usage.sources):.0%}",
        f"up {usage.bytes_up:,} B, down {usage.bytes_down:,} B",
        count(usage.round_trips, "round trip"),
        f"first token {usage.ttft_ms:.0f} ms, then {usage.tpot_ms:.0f} ms a token",
        *_mode_words(usage),
    ]
    if note:
        words.append(note)
    return outside_text(f"[{'; '.join(words)}]", "dim")


def _mode_words(usage: Usage) -> list[str]:
    """The modes that `auto` chose, in order, and other changes of the mode."""
    words = [f"from token {each.token} on {each.mode}: {each.reason}" for each in usage.switches]
    if usage.mode is Mode.AUTO and not any(each.token == 0 for each in usage.switches):
        words.insert(0, f"auto began as {Mode.COLLABORATIVE}")
    return words


def lines_table(title: str, headers: Iterable[str]) -> FittedTable:
    """Return an empty table whose cells have several lines, so that it fits a terminal."""
    table = FittedTable(title=title, title_justify="left", show_lines=True)
    for header in headers:
        table.add_column(header, overflow="fold")
    return table


def cell_of(*lines: str) -> Text:
    """Return a cell with text from outside, a line each; the first is bold."""
    first, *others = [outside_text(line) for line in lines or ("-",)]
    first.stylize("bold")
    return Text("\n").join((first, *others))


def print_rows(console: Console, rows: Sequence[Struct], title: str, *, as_json: bool) -> None:
    """Print rows of one type as a table, or as one JSON array.

    A table whose longest words do not fit the terminal becomes a list: one field a line.
    """
    if as_json:
        print_json(rows)
        return
    if not rows:
        console.print(f"{title}: none yet")
        return
    table = FittedTable(title=title, title_justify="left")
    fields = rows[0].__struct_fields__
    for name in fields:
        value = getattr(rows[0], name)
        is_number = isinstance(value, int | float) and not name.endswith(TIMES)
        header = HEADERS.get(name, name.replace("_", " "))
        header += ", UTC" if name.endswith(TIMES) else ""
        table.add_column(header, justify="right" if is_number else "left")
    for row in rows:
        table.add_row(*(_cell(name, getattr(row, name)) for name in fields))
    console.print(table)


def _cell(name: str, value: object) -> Text:
    text = _cell_text(name, value)
    return text if isinstance(text, Text) else outside_text(text)


def _cell_text(name: str, value: object) -> str | Text:
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case dict() if name == "tags":
            return ", ".join(format_tags(value)) or "-"
        case dict():
            return _sources_cell(value)
        case int() | float():
            return _number_cell(name, value)
        case tuple() | list():
            return ", ".join(map(str, value)) or "-"
        case ConfigProblem():
            return value.message
    return str(value)


def _sources_cell(sources: Mapping[str, int]) -> str | Text:
    if not sources:
        return "-"
    exits = exits_of(sources)
    counts = [Text(f"{s} {count:,}", source_style(s, exits)) for s, count in sources.items()]
    return Text("\n").join((source_bar(sources), Text("  ").join(counts)))


def _number_cell(name: str, value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    if name.endswith(TIMES):
        return format_time(value, TO_THE_SECOND)
    return f"{value:.1%}" if name.endswith("rate") else f"{value:.1f}"
