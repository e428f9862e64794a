"""Plots of the edge, worker and chat benchmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from fleet.utils.plots import COLOURS


def plot_engines(rows: Sequence[dict[str, Any]]) -> Figure:
    """Plot speed over agreement, one mark an engine with the most threads.

    Rows without either are left out.
    """
    num_threads = max(row["threads"] for row in rows)
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    whole = [
        row
        for row in rows
        if row["threads"] == num_threads and row["agreement"] and "tokens_per_s" in row
    ]
    for i, row in enumerate(whole):
        colour = COLOURS[i % len(COLOURS)]
        axes.vlines(
            row["agreement"], row["tokens_per_s_low"], row["tokens_per_s_high"], color=colour
        )
        name = f"{row['engine'].removesuffix(' ' + row['preset'])} {row['preset']}"
        axes.scatter(row["agreement"], row["tokens_per_s"], color=colour, label=name, clip_on=False)
    axes.set(
        title=f"the whole model on {num_threads} threads",
        xlabel="agreement with float32",
        ylabel="tokens per second",
    )
    axes.set_xlim(right=1)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color="#ddd")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def plot_devices(result: dict[str, Any]) -> Figure:
    """Plot the devices that one core serves over the offload rate.

    The streams of the whole model stand next to them.
    """
    curve = result["devices"]["curve"]
    rates = [point["offload_rate"] for point in curve]
    devices = [point["devices"] for point in curve]
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(
        rates, devices, marker="o", color=COLOURS[0], label="collaborating devices", clip_on=False
    )
    streams = "cloud-only streams of the whole model"
    axes.axhline(result["devices"]["cloud_only"]["devices"], color=COLOURS[1], label=streams)
    title = f"devices on one core, 95% of the tokens within {result['p95_ms']:g} ms"
    axes.set(title=title, xlabel="offload rate", xlim=(0, 1))
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(axis="y", color="#ddd")
    axes.legend()
    return figure


def plot_chat(result: Mapping[str, Any]) -> Figure:
    """Plot the time to the first token and the bytes up over the turns of a chat.

    Each engine has a colour; a dashed line is the same prompt of which nothing is kept.
    """
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    times, sizes = figure.subplots(1, 2)
    own = {f"device, {result['mode']}": result}
    for i, (name, each) in enumerate((own | result["peers"]).items()):
        for kind, line in (("turns", "-"), ("fresh", "--")):
            label = name if kind == "turns" else f"{name}, fresh"
            style = {"label": label, "color": COLOURS[i], "linestyle": line, "marker": "o"}
            turns = [row["turn"] for row in each[kind]]
            times.plot(turns, [row["ttft_ms"] for row in each[kind]], **style)
            if each is result:
                sizes.plot(turns, [row["bytes_up"] / 1e3 for row in each[kind]], **style)
    times.set(title="time to the first token", xlabel="turn", ylabel="ms")
    sizes.set(title="bytes up", xlabel="turn", ylabel="kB")
    for axes in (times, sizes):
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", color="#ddd")
    times.legend()
    return figure
