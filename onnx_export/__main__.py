"""Command line of the export: ``python -m onnx_export`` turns a model into a bundle."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from fleet.errors import ConfigError
from fleet.utils.cli_runtime import run_command
from fleet.utils.console import new_console, outside_text
from fleet.utils.path_options import path_option
from onnx_export.config import (
    DEFAULT_MODEL,
    DEFAULT_THRESHOLD,
    QUANTIZATIONS,
    ExportConfig,
    format_layers,
    require_packages,
)
from onnx_export.default_bundle import EXITS

N = TypeVar("N", int, float)


def export_command(
    out: Annotated[Path, path_option(help="Folder of the bundle; it must not exist or be empty.")],
    exits: Annotated[
        str, typer.Option(help="Layers that run before each exit, increasing.")
    ] = format_layers(EXITS),
    model: Annotated[
        str, typer.Option(help="'default', a hub name, a checkpoint's folder or a GGUF file.")
    ] = DEFAULT_MODEL,
    heads: Annotated[
        Path | None,
        path_option(help="Trained exit heads; by default those shipped, or the final norm."),
    ] = None,
    exit_head: Annotated[
        str | None,
        typer.Option(help="'shared': exits share the model's final norm on purpose (LayerSkip)."),
    ] = None,
    split: Annotated[
        int | None,
        typer.Option(
            min=1, max=1000, help="Exit up to which devices run by default: the last, unless given."
        ),
    ] = None,
    uploads: Annotated[
        str | None,
        typer.Option(
            "--uploads",
            "--upload-layer",
            help="Exits whose hidden states can be uploaded; by default the split alone.",
        ),
    ] = None,
    quantization: Annotated[
        str, typer.Option(help=f"Quantization of the edge: {', '.join(QUANTIZATIONS)}.")
    ] = ExportConfig.quantization,
    thresholds: Annotated[
        str | None,
        typer.Option(help=f"One threshold for each exit, by default {DEFAULT_THRESHOLD}."),
    ] = None,
    calibration: Annotated[
        Path | None, path_option(help="Calibration file of 'fleet heads calibrate --write'.")
    ] = None,
    max_positions: Annotated[
        int, typer.Option(min=8, max=1 << 20, help="Maximum length of a session, in tokens.")
    ] = ExportConfig.max_positions,
    accept: Annotated[
        float,
        typer.Option(
            metavar="AGREEMENT",
            help="Least share of tokens equal to PyTorch's, if less than the export requires.",
        ),
    ] = ExportConfig.accept,
    prompt_format: Annotated[
        str | None,
        typer.Option(
            help="'chat': conversations, the default of a model with a chat template; "
            "'raw': texts, which the model continues."
        ),
    ] = None,
) -> None:
    """Export MODEL as a bundle for devices and cloud workers."""
    exit_layers = parse_numbers(exits, int, "--exits", "8,15")
    upload_layers = parse_numbers(uploads, int, "--uploads", "8,15") if uploads else []
    values = parse_numbers(thresholds, float, "--thresholds", "0.8,0.8") if thresholds else None
    config = ExportConfig(
        out=out,
        exits=tuple(exit_layers),
        model=model,
        heads=heads,
        exit_head=exit_head,
        split_layer=split,
        uploads=tuple(upload_layers),
        quantization=quantization,  # type: ignore[arg-type]  # checked by the export
        thresholds=tuple(values) if values else None,
        calibration=calibration,
        max_positions=max_positions,
        accept=accept,
        prompt_format=prompt_format,  # type: ignore[arg-type]  # checked by the export
    )
    require_packages()
    config.check()
    print(export_with_progress(config))


def export_with_progress(config: ExportConfig) -> str:
    """Export a bundle with progress and the parity table on stderr; return its bundle id."""
    from onnx_export.bundle import export_bundle
    from onnx_export.report import parity_table

    console = new_console(stderr=True)
    with console.status("starting") as status:

        def progress(line: str) -> None:
            console.print(line, highlight=False)
            status.update(outside_text(line))

        def report(figures: Mapping[str, float], limits: Mapping[str, float]) -> None:
            console.print(parity_table(figures, limits))

        return export_bundle(config, progress, report).bundle_id


def parse_numbers(text: str, number: Callable[[str], N], option: str, example: str) -> list[N]:
    """Return the numbers of a comma-separated list.

    Raises:
        ConfigError: an element is not a number.
    """
    try:
        return [number(element) for element in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"{option} {text!r}: expected numbers with commas between, e.g. {example}"
        ) from None


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
app.command()(export_command)


if __name__ == "__main__":
    run_command("python -m onnx_export", app)
