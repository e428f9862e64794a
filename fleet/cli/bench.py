"""`fleet bench`: the project's benchmarks, from a checkout."""

from __future__ import annotations

import importlib

import typer

from fleet.cli.export import PASS_ON
from fleet.cli.lazy import OWN, missing
from fleet.errors import ConfigError

app = typer.Typer(no_args_is_help=True, help="Measure the engines on this machine, from a checkout.")


@app.command(context_settings=PASS_ON)
def edge(context: typer.Context) -> None:
    """The edge engine beside llama.cpp and onnxruntime-genai, and what a device costs."""
    try:
        module = importlib.import_module("benchmarks.edge")
    except ModuleNotFoundError as error:
        if error.name == "benchmarks":
            raise ConfigError(
                "the benchmarks are not part of the installed package; run 'make bench' in a checkout of the project"
            ) from None
        if (error.name or "").partition(".")[0] in OWN:
            raise
        raise missing(error.name or "a package", "edge,export,server") from None
    module.app(args=context.args, prog_name="fleet bench edge", standalone_mode=False)
