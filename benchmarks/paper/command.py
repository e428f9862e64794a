"""The experiments of the CE-CoLLM paper (arXiv 2411.02829) on this system, beside stronger baselines.

    fleet bench paper [--size small|medium|full] [--only table,latency] [--data DIR] [--out DIR] [--plot DIR] [--json]
    fleet bench paper --only ''         # measures nothing more, and prints what there is
    fleet bench paper --fit             # fits 'fleet plan' to the rows that there are

Rows are kept as they are measured: the same command goes on where another was cut off. Run it on an idle machine.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Final

import msgspec
import typer
from rich.console import Console

from benchmarks.edge import parse_list
from benchmarks.paper.accuracy import fits, score
from benchmarks.paper.fit import HeldBack, fit
from benchmarks.paper.measure import PARTS as MEASURED
from benchmarks.paper.measure import measure
from benchmarks.paper.report import Summary, conditions, encode, held_back, sheets
from benchmarks.paper.results import Results, new_run
from benchmarks.paper.sets import load as load_set
from benchmarks.paper.sizes import SIZES
from benchmarks.paper.tasks import Sample
from fleet.bundles.manifest import Bundle
from fleet.errors import ConfigError
from fleet.planning.cost_model import DATA, Fit, read_fits, write_fits
from fleet.utils.cli_runtime import run_command
from onnx_export.checkpoint import cache_folder
from onnx_export.default_bundle import default_bundle

PARTS: Final = (*MEASURED, "accuracy")
BUSY: Final = 0.5  # load average before anything is measured

Progress = Callable[[str], None]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def run(
    size: Annotated[str, typer.Option(help=f"How much: {' or '.join(SIZES)}.")] = "small",
    only: Annotated[str, typer.Option(help="Parts to measure; '' for none.")] = ",".join(PARTS),
    data: Annotated[
        Path | None, typer.Option(help="Folder of the datasets' files (default: the hub).")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the rows (default: one in the user's cache).")
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option(help="Bundle's folder (default: the default model's).")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="By which samples are drawn.")] = 0,
    refit: Annotated[
        bool, typer.Option("--fit", help="Fit 'fleet plan' to the rows; measure nothing.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Folder for pictures, *.svg.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Measure what the paper measured, and print it beside the paper's figures."""
    if size not in SIZES:
        raise ConfigError(f"--size {size!r}: expected one of {', '.join(SIZES)}")
    parts = parse_list(only, PARTS, "part")
    if data is not None and not data.is_dir():
        raise ConfigError(
            f"--data {data}: expected a folder with the datasets' files; leave it out to take the hub's"
        )
    console = Console(stderr=True)

    def progress(line: str) -> None:
        console.print(line, style="dim", highlight=False, soft_wrap=True)

    if refit and out is not None:
        results = Results.open(out)
    else:
        opened = Bundle.load(bundle or default_bundle(progress))
        folder = out or cache_folder() / "paper" / f"{size}-{opened.manifest.bundle_id[:8]}"
        if refit:
            results = Results.open(folder)
        else:
            results = Results.begin(folder, new_run(opened, size, seed))
            measure_parts(parts, results, opened, data, progress)
    if refit:
        print_fit(*keep_fit(results, DATA), as_json=as_json)
        return
    summary = results.summary()
    if plot is not None:
        from benchmarks.paper.plots import draw

        draw(summary, plot)
    if as_json:
        print(encode(summary).decode(), end="")
    else:
        print_summary(Console(), summary, results.folder)


def measure_parts(
    parts: Sequence[str], results: Results, bundle: Bundle, data: Path | None, progress: Progress
) -> None:
    """Measures what is missing of some parts."""
    if not parts:
        return
    size = SIZES[results.run.size]
    run = results.run
    fitting = fits(bundle, size)
    if (load_average := os.getloadavg()[0]) > BUSY:
        progress(
            f"the machine is busy (load {load_average:.1f}): times will be too long, and differ from row to row"
        )
    progress(
        f"rows in {results.folder}: {len(results.rows)} measured before, {len(results.scored)} scored"
    )

    def load(name: str, num: int) -> list[Sample]:
        return load_set(name, num, run.seed, data, fits=fitting, progress=progress)

    def prompts(name: str, num: int) -> list[str]:
        return [sample.prompt for sample in load(name, num)]

    if measured := tuple(part for part in MEASURED if part in parts):
        measure(size, bundle, prompts, results.rows, run.run, progress, measured)
    if "accuracy" in parts:
        score(size, bundle, load=load, scored=results.scored, run=run.run, progress=progress)


def keep_fit(results: Results, path: Path) -> tuple[Fit, list[HeldBack]]:
    """Fits `fleet plan` and writes its data: beside fits of other exits of the same model, in the place of the same."""
    fitted, checked = fit(results.rows, results.run)
    others = read_fits(path) if path.exists() else ()
    kept = [one for one in others if (one.model, one.machine) == (fitted.model, fitted.machine)]
    write_fits([fitted, *(one for one in kept if one.exits != fitted.exits)], path)
    return fitted, checked


def print_fit(fitted: Fit, checked: Sequence[HeldBack], *, as_json: bool) -> None:
    """The constants, and how far off they are."""
    if as_json:
        print(msgspec.json.encode({"fit": fitted, "held_back": checked}).decode())
        return
    console = Console(highlight=False)
    for sheet in held_back(checked):
        console.print(sheet.rich())
    console.print(
        f"a step: {fitted.edge.step_ms:.1f} ms on the device, {fitted.cloud.step_ms:.1f} ms in the cloud"
    )
    within = fitted.errors["within_15_percent"]
    highest = fitted.errors["highest"]
    console.print(
        f"{within:.0%} of these are within 15%, the furthest is {highest:.1%} off; kept in {DATA}"
    )


def print_summary(console: Console, summary: Summary, folder: Path) -> None:
    """All tables."""
    for tables in sheets(summary).values():
        for sheet in tables:
            console.print(sheet.rich())
    console.print(f"{conditions(summary.run)} Rows in {folder}", highlight=False)


if __name__ == "__main__":
    run_command("benchmarks.paper.command", app)
