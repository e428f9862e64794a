"""Small pictures in SVG, made by the server, with classes in the place of styles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from markupsafe import Markup

from fleet.protocol.modes import CLOUD, FALLBACK, LOOKUP
from fleet.server.console.formatting import exits_in_order, percent, source_class

BAR_WIDTH: Final = 200.0
SPARK_WIDTH: Final = 96.0
SPARK_HEIGHT: Final = 22.0


def source_picture(sources: Mapping[str, int]) -> Markup:
    """Return the shares of sources as a bar, with the same values as its text for readers."""
    total = sum(sources.values())
    if not total:
        return Markup('<span class="dim">no tokens</span>')
    exits = exits_in_order(sources)
    parts: list[Markup] = []
    start = 0.0
    words = []
    for source in (*exits, LOOKUP, CLOUD, FALLBACK):
        share = sources.get(source, 0) / total
        if not share:
            continue
        words.append(f"{source} {percent(share)}")
        parts.append(
            Markup('<rect class="{}" x="{:.2f}" width="{:.2f}" height="10"/>').format(
                source_class(source, exits), start, share * BAR_WIDTH
            )
        )
        start += share * BAR_WIDTH
    return Markup(
        '<svg class="bar" viewBox="0 0 200 10" preserveAspectRatio="none" role="img">'
        "<title>{}</title>{}</svg>"
    ).format(", ".join(words), Markup("").join(parts))


def sparkline(values: Sequence[float | None]) -> Markup:
    """Return shares from 0 to 1 over time as a line; spans without a value are gaps."""
    known = [value for value in values if value is not None]
    if not known:
        return Markup("")
    step = SPARK_WIDTH / max(1, len(values) - 1)
    runs: list[list[str]] = [[]]
    for place, value in enumerate(values):
        if value is None:
            runs.append([])
        else:
            height = 2 + (1 - min(1.0, max(0.0, value))) * (SPARK_HEIGHT - 4)
            runs[-1].append(f"{place * step:.1f},{height:.1f}")
    lines = [_line(run) for run in runs if run]
    title = f"{len(known)} spans, from {percent(known[0])} to {percent(known[-1])}"
    return Markup(
        '<svg class="spark" viewBox="0 0 96 22" role="img"><title>{}</title>{}</svg>'
    ).format(title, Markup("").join(lines))


def _line(points: list[str]) -> Markup:
    if len(points) == 1:
        x, _, y = points[0].partition(",")
        return Markup('<circle cx="{}" cy="{}" r="1.5"/>').format(x, y)
    return Markup('<polyline points="{}"/>').format(" ".join(points))
