"""The trade between agreement and offload as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from fleet.exits.thresholds import Point
from fleet.utils.plots import COLOURS


def plot_curves(
    title: str, curves: Mapping[str, Sequence[Point]], marks: Mapping[str, Point] | None = None
) -> Figure:
    """Curves by name, offload rate over agreement, and single points by name."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for i, (name, curve) in enumerate(curves.items()):
        points = sorted(curve, key=lambda point: point.agreement)
        axes.plot(
            [point.agreement for point in points],
            [point.offload_rate for point in points],
            label=name,
            color=COLOURS[i % len(COLOURS)],
        )
    for name, point in (marks or {}).items():
        place = point.agreement, point.offload_rate
        axes.plot(*place, "o", color="black", fillstyle="none")
        axes.annotate(name, place, xytext=(6, 6), textcoords="offset points")
    low = min([0.8, *(point.agreement for curve in curves.values() for point in curve)])
    axes.set(
        title=title,
        xlim=(low, 1),
        ylim=(0, 1),
        xlabel="overall agreement with the full model",
        ylabel="offload rate (tokens from the cloud)",
    )
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(axis="y", color="#ddd")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure
