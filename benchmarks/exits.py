"""Agreement and offload of the default model's exits, for the shipped configuration and others.

    python -m benchmarks.exits --prompts FILE.jsonl [--exits 8,15]... [--plot docs/exits.svg]
        [--json]

Each configuration is exported with the shipped heads, then every exit is evaluated at every
position of the full model's own greedy answers, as deployed. The output is agreement by exit, the
offload rate at overall agreement 0.98, 0.95 and 0.90 with the best thresholds for these prompts,
and the figures of the bundle's own thresholds on them. Prompts should be unseen by training and
calibration.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fleet.bundles.manifest import Bundle
from fleet.cli.heads import evaluation, load_or_record, print_exits, print_targets
from fleet.exits.thresholds import OperatingPoint, evaluate_thresholds, frontier
from fleet.utils.console import new_console
from fleet.utils.optional_imports import needs
from fleet.utils.path_options import path_option
from fleet.utils.prompt_file import PromptFile
from onnx_export.bundle import export_bundle
from onnx_export.checkpoint import cache_folder
from onnx_export.config import ExportConfig, format_layers
from onnx_export.default_bundle import EXITS, build_key, default_bundle


def bundle_with(exits: tuple[int, ...], console: Console) -> Bundle:
    """Return the default model with some exits, exported once."""
    if exits == EXITS:
        return Bundle.load(default_bundle(console.print))
    folder = cache_folder() / "bundles" / f"exits-{format_layers(exits)}-{build_key()}"
    if not folder.exists():
        export_bundle(ExportConfig(out=folder, exits=exits), console.print)
    return Bundle.load(folder)


def run(
    prompts: Annotated[list[Path], path_option(help="File of prompts; can be repeated.")],
    exits: Annotated[
        list[str] | None, typer.Option(help="Configurations in addition to the shipped one.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    limit: Annotated[int | None, typer.Option(help="Only the first prompts.")] = None,
    plot: Annotated[Path | None, path_option(help="Plot the curves into *.svg or *.png.")] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Measure the exits of one or more configurations on the same prompts."""
    if plot:
        with needs("plots"):
            from fleet.exits.plot import plot_curves
            from fleet.utils.plots import check_plot, save
        check_plot(plot)
    errors = new_console(stderr=True)
    console = new_console()
    configurations = [EXITS, *(tuple(map(int, text.split(","))) for text in exits or ["8,15"])]
    results: dict[str, Any] = {}
    curves: dict[str, list[OperatingPoint]] = {}
    marks: dict[str, OperatingPoint] = {}
    files = list(map(PromptFile.read, prompts))
    for layers in dict.fromkeys(configurations):
        bundle = bundle_with(layers, errors)
        records = load_or_record(bundle, files, max_new_tokens, None, limit).records
        shown = format_layers(layers)
        name = f"exits {shown}" if len(layers) > 1 else f"exit {shown}"
        results[format_layers(layers)] = evaluation(records, bundle.manifest.thresholds)
        curves[name] = frontier(records)
        if bundle.manifest.calibration is not None:
            marks[f"{format_layers(layers)}, calibrated"] = evaluate_thresholds(
                records, bundle.manifest.thresholds
            )
        if not as_json:
            console.rule(f"{name}{' (shipped)' if layers == EXITS else ''}")
            print_exits(console, results[format_layers(layers)])
            print_targets(console, records, bundle.manifest.thresholds)
    if plot is not None:
        figure = plot_curves("offload of SmolLM2-135M-Instruct", curves, marks)
        save(figure, plot)
    if as_json:
        print(json.dumps(results))


if __name__ == "__main__":
    typer.run(run)
