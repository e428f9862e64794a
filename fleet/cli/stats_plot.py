"""Statistics as a picture, PNG or SVG: sources of tokens, and the trend of the offload rate."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from matplotlib.axes import Axes
from matplotlib.dates import ConciseDateFormatter
from matplotlib.figure import Figure

from fleet.cli.stats_views import key_of
from fleet.cli.views import STYLES, exits_of
from fleet.protocol.types import DAY_S
from fleet.registry.results import HourStats, StatsCounts
from fleet.registry.stats.rollup_columns import HOUR_S
from fleet.registry.stats.rollups import span_start
from fleet.registry.stats.time_spans import trend_span_s
from fleet.utils.plots import save

MAX_ROWS: Final = 30
MAX_TRENDS: Final = 10
COLOURS: Final = {"cloud": "#a2307f", "fallback": "#c9a400", "lookup": "#28a5b5"}
EXIT_COLOURS: Final = ("#2e8b57", "#1f77b4", "#4b4bc8", "#7fbf7f")


def plot_stats(rows: Sequence[StatsCounts], path: Path, since: float, now: float) -> None:
    """Draw the `MAX_ROWS` rows with the most tokens.

    Their trends begin at `since` and end at `now`, in seconds since 1970.

    Raises:
        ConfigError: the file cannot be written.
    """
    most_tokens = sorted(rows, key=lambda row: row.tokens, reverse=True)[:MAX_ROWS]
    shown = [row for row in rows if row in most_tokens]
    figure = Figure(figsize=(11, max(3.0, 1.2 + 0.32 * len(shown))), layout="constrained")
    bars, trend = figure.subplots(1, 2)
    _draw_bars(bars, shown)
    if any(row.tokens for row in shown):
        figure.legend(loc="outside upper left", ncols=6)
    if shown and isinstance(shown[0], HourStats):
        _draw_hours(trend, shown)
    else:
        _draw_trends(trend, shown, since, now)
    trend.set(ylim=(-0.03, 1.03), ylabel="offload rate")
    save(figure, path)


def _draw_bars(axes: Axes, rows: Sequence[StatsCounts]) -> None:
    names = [key_of(row) for row in rows]
    left = [0.0] * len(rows)
    exits = exits_of(source for row in rows for source in row.sources)
    for source in (*exits, *STYLES):
        shares = [row.shares.get(source, 0.0) for row in rows]
        colour = COLOURS.get(source) or EXIT_COLOURS[exits.index(source) % len(EXIT_COLOURS)]
        if any(shares):
            axes.barh(names, shares, left=left, label=source, color=colour)
        left = [a + b for a, b in zip(left, shares, strict=True)]
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel="share of tokens")


def _draw_hours(axes: Axes, rows: Sequence[StatsCounts]) -> None:
    axes.plot([key_of(row) for row in rows], [row.offload_rate for row in rows], marker=".")
    axes.tick_params("x", rotation=90, labelsize=6)


def _draw_trends(axes: Axes, rows: Sequence[StatsCounts], since: float, now: float) -> None:
    with_trend = [row for row in rows if any(rate is not None for rate in row.trend)]
    for row in with_trend[:MAX_TRENDS]:
        times = trend_times(len(row.trend), since, now)
        rates = [float("nan") if rate is None else rate for rate in row.trend]
        axes.plot(times, rates, marker=".", label=key_of(row))  # type: ignore[arg-type]
    if with_trend:
        axes.set_xlim(*_date_limits(since, now))
        dates = ConciseDateFormatter(axes.xaxis.get_major_locator())  # type: ignore[no-untyped-call]
        axes.xaxis.set_major_formatter(dates)
        axes.legend(fontsize="small")
    axes.set(xlabel="UTC")


def _date_limits(since: float, now: float) -> tuple[float, float]:
    """Return the limits of the axis of dates, in days since 1970, with an hour at each end."""
    margin_s = max(HOUR_S, 0.04 * (now - since))
    return (since - margin_s) / DAY_S, (now + margin_s) / DAY_S


def trend_times(num_points: int, since: float, now: float) -> list[datetime]:
    """Return the begin, in UTC, of each point of a trend."""
    span_s = trend_span_s(now - since)
    first = span_start(since, span_s)
    return [datetime.fromtimestamp(first + i * span_s, UTC) for i in range(num_points)]
