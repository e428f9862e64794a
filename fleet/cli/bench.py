"""`fleet bench`: the project's benchmarks, from a checkout."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import typer

from fleet.errors import ConfigError


def bench(context: typer.Context) -> None:
    """Run a benchmark on this machine, from a checkout of the project."""
    if not (Path(__file__).parents[2] / "benchmarks").is_dir():
        raise ConfigError("the benchmarks are not installed; run them in a checkout of the project")
    # The benchmark takes this process's place, so that signals and the exit status are its own.
    os.execv(sys.executable, [sys.executable, "-m", "benchmarks", *context.args])
