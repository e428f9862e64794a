"""python -m onnx_export: one command from a model to a bundle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.console import Console

from fleet.errors import ConfigError
from fleet.utils.cli_runtime import run_command
from onnx_export.config import (
    DEFAULT_MODEL,
    DEFAULT_THRESHOLD,
    QUANTIZATIONS,
    ExportConfig,
    require_packages,
    show,
)
from onnx_export.default_bundle import EXITS

N = TypeVar("N", int, float)


def export(
    out: Annotated[Path, typer.Option(help="Folder of the bundle; it must not exist or be empty.")],
    exits: Annotated[str, typer.Option(help="Layers run before each exit, increasing.")] = show(
        EXITS
    ),
    model: Annotated[
        str, typer.Option(help="'default', a hub name or a checkpoint's folder.")
    ] = DEFAULT_MODEL,
    heads: Annotated[
        Path | None,
        typer.Option(help="Trained exit heads; without them exits share the model's final norm."),
    ] = None,
    exit_head: Annotated[
        str | None,
        typer.Option(help="'shared': exits share the model's final norm on purpose (LayerSkip)."),
    ] = None,
    split: Annotated[int | None, typer.Option(help="Layers on the edge: the last exit.")] = None,
    upload_layer: Annotated[
        int | None, typer.Option(help="Exit whose hidden states are uploaded: the last.")
    ] = None,
    quantization: Annotated[
        str, typer.Option(help=f"Of the edge: {', '.join(QUANTIZATIONS)}.")
    ] = "balanced",
    thresholds: Annotated[
        str | None, typer.Option(help=f"One for each exit, else {DEFAULT_THRESHOLD}.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Kept by 'fleet heads calibrate --write'.")
    ] = None,
    max_positions: Annotated[
        int, typer.Option(help="Longest session, in tokens.")
    ] = ExportConfig.max_positions,
) -> None:
    """Export MODEL as a bundle for devices and cloud workers."""
    config = ExportConfig(
        out=out,
        exits=tuple(parse_numbers(exits, int, "--exits", "8,15")),
        model=model,
        heads=heads,
        exit_head=exit_head,
        split_layer=split,
        upload_layer=upload_layer,
        quantization=quantization,  # type: ignore[arg-type]  # checked by the export
        thresholds=tuple(parse_numbers(thresholds, float, "--thresholds", "0.8,0.8"))
        if thresholds
        else None,
        calibration=calibration,
        max_positions=max_positions,
    )
    require_packages()
    config.check()
    console = Console(stderr=True)
    with console.status("starting") as status:

        def progress(line: str) -> None:
            console.print(line, highlight=False)
            status.update(line)

        from onnx_export.bundle import export_bundle
        from onnx_export.report import parity_table

        manifest = export_bundle(
            config, progress, lambda *report: console.print(parity_table(*report))
        )
    print(manifest.bundle_id)


def parse_numbers(text: str, number: Callable[[str], N], option: str, example: str) -> list[N]:
    """Numbers out of a comma-separated list.

    Raises:
        ConfigError: something in it is no number.
    """
    try:
        return [number(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"{option} {text!r}: expected numbers with commas between, e.g. {example}"
        ) from None


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(export)


def main() -> None:
    """Entry point."""
    run_command("python -m onnx_export", app)


if __name__ == "__main__":
    main()
