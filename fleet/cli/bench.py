"""`fleet bench`: the project's benchmarks, from a checkout."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Final, NamedTuple

import typer

from fleet.cli.export import PASS_ON
from fleet.errors import ConfigError
from fleet.utils.optional_imports import OWN, missing

app = typer.Typer(
    no_args_is_help=True, help="Measure the engines on this machine, from a checkout."
)


class Bench(NamedTuple):
    """A module of `benchmarks` with an `app`, the extras that it needs, and what it measures."""

    module: str
    extras: str
    help: str


BENCHES: Final = {
    "edge": Bench(
        "edge",
        "edge,export,server",
        "The edge engine beside llama.cpp and onnxruntime-genai, and what a device costs.",
    ),
    "worker": Bench(
        "worker",
        "edge,export,server,worker",
        "Sessions and devices that one worker serves, and round trips a token.",
    ),
    "stats": Bench(
        "stats",
        "server,postgres",
        "The statistics of 1,000 devices over 30 days, on SQLite and on PostgreSQL.",
    ),
    "paper": Bench(
        "paper.command",
        "edge,export,server,worker,plots,bench",
        "The CE-CoLLM paper's experiments, beside other baselines.",
    ),
}


def _command(name: str, bench: Bench) -> Callable[[typer.Context], None]:
    def run(context: typer.Context) -> None:
        try:
            module = importlib.import_module(f"benchmarks.{bench.module}")
        except ModuleNotFoundError as error:
            if error.name == "benchmarks":
                raise ConfigError(
                    "the benchmarks are not part of the installed package; run them in a checkout of the project"
                ) from None
            if (error.name or "").partition(".")[0] in OWN:
                raise
            raise missing(error.name or "a package", bench.extras) from None
        module.app(args=context.args, prog_name=f"fleet bench {name}", standalone_mode=False)

    return run


for _name, _bench in BENCHES.items():
    app.command(_name, help=_bench.help, context_settings=PASS_ON)(_command(_name, _bench))
