"""The experiments of the CE-CoLLM paper (arXiv 2411.02829) with stronger baselines.

    fleet bench paper [--size small|medium|full] [--only table,latency] [--data DIR] [--out DIR]
        [--plot DIR] [--json]
    fleet bench paper --only ''    # measure nothing more, and print the present rows
    fleet bench paper --fit        # fit 'fleet plan' to the present rows

Rows are saved as they are measured: the same command continues an interrupted run. Run it on an
idle machine.
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
from benchmarks.paper.fit import HeldBack, fit_cost_model
from benchmarks.paper.measure import PARTS as MEASURED
from benchmarks.paper.measure import measure_rows
from benchmarks.paper.report import Summary, conditions, encode, held_back, sheets
from benchmarks.paper.results import Results, new_run
from benchmarks.paper.sets import load_samples
from benchmarks.paper.sizes import SIZES
from benchmarks.paper.tasks import Sample
from fleet.bundles.manifest import Bundle
from fleet.errors import ConfigError
from fleet.planning.cost_model import DATA, CostFit, read_fits, write_fits
from fleet.utils.cli_runtime import run_command
from fleet.utils.console import new_console
from fleet.utils.path_options import path_option
from onnx_export.checkpoint import cache_folder
from onnx_export.default_bundle import default_bundle

PARTS: Final = (*MEASURED, "accuracy")
BUSY: Final = 0.5  # load average before anything is measured

Progress = Callable[[str], None]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def run(
    size: Annotated[str, typer.Option(help=f"Size of the run: {' or '.join(SIZES)}.")] = "small",
    only: Annotated[str, typer.Option(help="Parts to measure; '' for none.")] = ",".join(PARTS),
    data: Annotated[
        Path | None, path_option(help="Folder of the datasets' files (default: the hub).")
    ] = None,
    out: Annotated[
        Path | None, path_option(help="Folder of the rows (default: one in the user's cache).")
    ] = None,
    bundle: Annotated[
        Path | None, path_option(help="Bundle's folder (default: the default model's).")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the samples.")] = 0,
    refit: Annotated[
        bool, typer.Option("--fit", help="Fit 'fleet plan' to the rows; measure nothing.")
    ] = False,
    plot: Annotated[Path | None, path_option(help="Folder for pictures, *.svg.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Repeat the paper's measurements, and print them next to the paper's figures."""
    if size not in SIZES:
        raise ConfigError(f"--size {size!r}: expected one of {', '.join(SIZES)}")
    parts = parse_list(only, PARTS, "part")
    if data is not None and not data.is_dir():
        raise ConfigError(
            f"--data {data}: expected a folder with the datasets' files; "
            "leave it out to use the hub's"
        )
    console = new_console(stderr=True)

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
        from benchmarks.paper.plots import draw_figures

        draw_figures(summary, plot)
    if as_json:
        print(encode(summary).decode(), end="")
    else:
        print_summary(new_console(), summary, results.folder)


def measure_parts(
    parts: Sequence[str], results: Results, bundle: Bundle, data: Path | None, progress: Progress
) -> None:
    """Measure the missing rows of some parts."""
    if not parts:
        return
    size = SIZES[results.run.size]
    run = results.run
    fitting = fits(bundle, size)
    if (load_average := os.getloadavg()[0]) > BUSY:
        progress(
            f"the machine is busy (load {load_average:.1f}): "
            "times will be too long, and differ from row to row"
        )
    progress(
        f"rows in {results.folder}: {len(results.rows)} measured before, "
        f"{len(results.scored)} scored"
    )

    def samples_of(name: str, num: int) -> list[Sample]:
        return load_samples(name, num, run.seed, data, fits=fitting, progress=progress)

    def prompts(name: str, num: int) -> list[str]:
        return [sample.prompt for sample in samples_of(name, num)]

    if measured := tuple(part for part in MEASURED if part in parts):
        measure_rows(size, bundle, prompts, results.rows, run.run, progress, measured)
    if "accuracy" in parts:
        score(size, bundle, load=samples_of, scored=results.scored, run=run.run, progress=progress)


def keep_fit(results: Results, path: Path) -> tuple[CostFit, list[HeldBack]]:
    """Fit `fleet plan` and write its data.

    Fits of other exits of the same model stay; one of the same exits is replaced.
    """
    fitted, checked = fit_cost_model(results.rows, results.run)
    others = read_fits(path) if path.exists() else ()
    others_of_model = [
        one for one in others if (one.model, one.machine) == (fitted.model, fitted.machine)
    ]
    write_fits([fitted, *(one for one in others_of_model if one.exits != fitted.exits)], path)
    return fitted, checked


def print_fit(fitted: CostFit, checked: Sequence[HeldBack], *, as_json: bool) -> None:
    """Print the constants and their errors."""
    if as_json:
        print(msgspec.json.encode({"fit": fitted, "held_back": checked}).decode())
        return
    console = new_console()
    for sheet in held_back(checked):
        console.print(sheet.rich())
    console.print(
        f"a step: {fitted.edge.step_ms:.1f} ms on the device, "
        f"{fitted.cloud.step_ms:.1f} ms in the cloud"
    )
    within = fitted.errors["within_15_percent"]
    highest = fitted.errors["highest"]
    console.print(
        f"{within:.0%} of these are within 15%, the furthest is {highest:.1%} off; kept in {DATA}"
    )


def print_summary(console: Console, summary: Summary, folder: Path) -> None:
    """Print all tables."""
    for tables in sheets(summary).values():
        for sheet in tables:
            console.print(sheet.rich())
    console.print(f"{conditions(summary.run)} Rows in {folder}", highlight=False)


if __name__ == "__main__":
    run_command("benchmarks.paper.command", app)
