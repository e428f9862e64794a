"""Statistics as a picture, PNG or SVG: where tokens came from, and how the offload rate went."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from matplotlib.figure import Figure

from fleet.cli.stats_views import key_of
from fleet.cli.views import STYLES, exits_of
from fleet.utils.plots import save

MAX_ROWS: Final = 30
COLOURS: Final = {"cloud": "#a2307f", "fallback": "#c9a400", "lookup": "#28a5b5"}
EXIT_COLOURS: Final = ("#2e8b57", "#1f77b4", "#4b4bc8", "#7fbf7f")


def plot_stats(rows: Sequence[Any], path: Path) -> None:
    """Draws the rows with the most tokens; at most 30.

    Raises:
        ConfigError: the file cannot be written.
    """
    shown = sorted(rows, key=lambda row: row.tokens, reverse=True)[:MAX_ROWS]
    shown = [row for row in rows if row in shown]
    figure = Figure(figsize=(11, max(3.0, 1.2 + 0.32 * len(shown))), layout="constrained")
    bars, trend = figure.subplots(1, 2)
    names = [key_of(row) for row in shown]
    left = [0.0] * len(shown)
    exits = exits_of(source for row in shown for source in row.sources)
    for source in (*exits, *STYLES):
        shares = [row.shares.get(source, 0.0) for row in shown]
        colour = COLOURS.get(source) or EXIT_COLOURS[exits.index(source) % len(EXIT_COLOURS)]
        if any(shares):
            bars.barh(names, shares, left=left, label=source, color=colour)
        left = [a + b for a, b in zip(left, shares, strict=True)]
    bars.invert_yaxis()
    bars.set(xlim=(0, 1), xlabel="share of tokens")
    if any(left):
        figure.legend(loc="outside upper left", ncols=6)
    lines = [row for row in shown if any(rate is not None for rate in row.trend)][:10]
    for row in lines:
        trend.plot(
            [float("nan") if rate is None else rate for rate in row.trend],
            marker=".",
            label=key_of(row),
        )
    if "hour_at" in rows[0].__struct_fields__ if rows else False:
        trend.plot(names, [row.offload_rate for row in shown], marker=".")
        trend.tick_params("x", rotation=90, labelsize=6)
    trend.set(ylim=(0, 1), ylabel="offload rate", xlabel="oldest to newest")
    if lines:
        trend.legend(fontsize="small")
    save(figure, path)
