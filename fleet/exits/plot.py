"""Plot of offload against agreement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from fleet.exits.thresholds import OperatingPoint
from fleet.utils.plots import COLOURS


def plot_curves(
    title: str,
    curves: Mapping[str, Sequence[OperatingPoint]],
    marks: Mapping[str, OperatingPoint] | None = None,
) -> Figure:
    """Plot curves by name, offload rate over agreement, and single points by name."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for i, (name, curve) in enumerate(curves.items()):
        points = sorted(curve, key=lambda point: point.agreement)
        x = [point.agreement for point in points]
        y = [point.offload_rate for point in points]
        axes.plot(x, y, label=name, color=COLOURS[i % len(COLOURS)])
    for name, point in (marks or {}).items():
        place = (point.agreement, point.offload_rate)
        axes.plot(*place, "o", color="black", fillstyle="none")
        axes.annotate(name, place, xytext=(6, 6), textcoords="offset points")
    axes.set(
        title=title,
        xlim=(lowest_agreement(curves), 1),
        ylim=(0, 1),
        xlabel="overall agreement with the full model",
        ylabel="offload rate (tokens from the cloud)",
    )
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(axis="y", color="#ddd")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def lowest_agreement(curves: Mapping[str, Sequence[OperatingPoint]]) -> float:
    """Return the left end of the agreement axis: 0.8, or less if a curve needs it."""
    agreements = [point.agreement for curve in curves.values() for point in curve]
    return min([0.8, *agreements])
