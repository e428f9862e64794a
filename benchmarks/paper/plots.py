"""The figures as SVG plots of matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.paper.accuracy_summary import Accuracy
from benchmarks.paper.figures import SystemFigures
from benchmarks.paper.report import Summary
from fleet.errors import ConfigError
from fleet.utils.plots import COLOURS, save


def draw_figures(summary: Summary, folder: Path) -> dict[str, Path]:
    """Write the plots that there are figures for, into a folder that is made if missing.

    Return their files by name.

    Raises:
        ConfigError: a plot cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot write {folder}: {error.strerror}; choose another --plot"
        ) from None
    return {
        name: save(make(), folder / f"paper-{name}.svg") for name, make in pictures(summary).items()
    }


def pictures(summary: Summary) -> dict[str, Callable[[], Figure]]:
    """Return the function of each plot, by name, in the order of the page."""
    table = [one for one in summary.figures if one.part == "table"]
    grid = [one for one in summary.figures if one.part == "latency"]
    plots: dict[str, Callable[[], Figure]] = {}
    if table:
        plots |= {"time": partial(_bars, table), "bytes": partial(_bytes, table)}
    if grid:
        plots["latency"] = partial(_latency, grid)
    if summary.accuracy:
        plots["accuracy"] = partial(_accuracy, summary.accuracy)
    return plots


def _colours(names: Sequence[str]) -> dict[str, str]:
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(dict.fromkeys(names))}


def _panels(names: Sequence[str], height: float) -> tuple[Figure, list[Any]]:
    """Return panels next to each other."""
    figure = Figure(figsize=(6 * len(names) + 2, height), layout="constrained")
    axes = list(figure.subplots(1, len(names), squeeze=False)[0])
    for axis, name in zip(axes, names, strict=True):
        axis.set_title(name)
    return figure, axes


def _bars(table: Sequence[SystemFigures]) -> Figure:
    """Plot the seconds of a mean answer by place, a bar a system.

    Times at which both sides work at once are not communication.
    """
    datasets = list(dict.fromkeys(one.dataset for one in table))
    figure, axes = _panels(datasets, 1.5 + 0.3 * len(table) / len(datasets))
    for axis, dataset in zip(axes, datasets, strict=True):
        here = [one for one in table if one.dataset == dataset]
        left = [0.0] * len(here)
        parts = {
            "edge": [one.edge_s for one in here],
            "cloud": [one.cloud_s for one in here],
            "communication and waiting": [max(0.0, one.communication_s) for one in here],
        }
        for (name, values), colour in zip(parts.items(), COLOURS, strict=False):
            axis.barh([one.system for one in here], values, left=left, label=name, color=colour)
            left = [a + b for a, b in zip(left, values, strict=True)]
        axis.invert_yaxis()
        axis.set_xlabel("seconds an answer")
    axes[-1].legend(loc="lower right")
    return figure


def _bytes(table: Sequence[SystemFigures]) -> Figure:
    """Plot the bytes of a mean answer, on a logarithmic axis."""
    datasets = list(dict.fromkeys(one.dataset for one in table))
    figure, axes = _panels(datasets, 1.5 + 0.3 * len(table) / len(datasets))
    for axis, dataset in zip(axes, datasets, strict=True):
        here = [one for one in table if one.dataset == dataset]
        axis.barh(
            [one.system for one in here], [max(1.0, one.bytes) for one in here], color=COLOURS[2]
        )
        axis.invert_yaxis()
        axis.set(xscale="log", xlabel="bytes an answer, up and down")
    return figure


def _latency(grid: Sequence[SystemFigures]) -> Figure:
    """Plot median seconds over the round trip, a panel a bandwidth, a line a system."""
    bandwidths = sorted({one.link.mbit_s for one in grid})
    figure, axes = _panels([f"{mbit_s:g} Mbit/s" for mbit_s in bandwidths], 5)
    for axis, mbit_s in zip(axes, bandwidths, strict=True):
        for name, colour in _colours([one.system for one in grid]).items():
            line = sorted(
                (one.link.rtt_ms, one.total_s.median)
                for one in grid
                if (one.system, one.link.mbit_s) == (name, mbit_s)
            )
            style = "--" if "split" in name or name == "cloud_only" else "-"
            axis.plot(
                *zip(*line, strict=True), style, marker=".", label=name, color=colour
            ) if line else None
        axis.set(xlabel="round trip, ms", ylabel="seconds an answer", xscale="log", yscale="log")
    axes[-1].legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _accuracy(scored: Sequence[Accuracy]) -> Figure:
    """Plot a task's metric over the share of tokens from the cloud.

    A panel is a dataset, a mark a system with its interval.
    """
    datasets = list(dict.fromkeys(row.dataset for row in scored))
    figure, axes = _panels(datasets, 5)
    colours = _colours([row.system for row in scored])
    for axis, dataset in zip(axes, datasets, strict=True):
        here = [row for row in scored if row.dataset == dataset]
        for row in here:
            colour = colours[row.system]
            axis.vlines(row.offload_rate, row.low, row.high, color=colour, linewidth=1)
            axis.scatter(row.offload_rate, row.value, color=colour, label=row.system)
        axis.set(xlabel="offload rate", ylabel=here[0].metric, xlim=(-0.05, 1.05))
    axes[-1].legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    return figure
