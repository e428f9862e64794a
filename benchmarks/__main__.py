"""Command line of the benchmarks: ``python -m benchmarks NAME``, or `fleet bench NAME`."""

from __future__ import annotations

from functools import partial

import typer

from fleet.cli.options import PASS_ON
from fleet.utils.cli_runtime import run_command
from fleet.utils.optional_imports import needs

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Measure the engines on this machine.",
)


@app.command(context_settings=PASS_ON)
def edge(context: typer.Context) -> None:
    """Compare the edge engine with llama.cpp and onnxruntime-genai; measure a device's costs."""
    with needs("edge,export,server"):
        from benchmarks.edge import app as edge_app
    _run(edge_app, context)


@app.command(context_settings=PASS_ON)
def worker(context: typer.Context) -> None:
    """Measure sessions and devices that one worker serves, and round trips a token."""
    with needs("edge,export,server,worker"):
        from benchmarks.worker import app as worker_app
    _run(worker_app, context)


@app.command(context_settings=PASS_ON)
def export(context: typer.Context) -> None:
    """Measure the export of a large random model, and the memory of its halves."""
    with needs("edge,export,server,worker"):
        from benchmarks.export import app as export_app
    _run(export_app, context)


@app.command(context_settings=PASS_ON)
def plan(context: typer.Context) -> None:
    """Compare what `fleet plan` predicts for other splits with measured times."""
    with needs("edge,export,server,worker"):
        from benchmarks.plan import app as plan_app
    _run(plan_app, context)


@app.command(context_settings=PASS_ON)
def stats(context: typer.Context) -> None:
    """Measure the statistics of 1,000 devices over 30 days, on SQLite and on PostgreSQL."""
    with needs("server,postgres"):
        from benchmarks.stats import app as stats_app
    _run(stats_app, context)


@app.command(context_settings=PASS_ON)
def paper(context: typer.Context) -> None:
    """Run the CE-CoLLM paper's experiments, with more baselines."""
    with needs("edge,export,server,worker,plots,bench"):
        from benchmarks.paper.command import app as paper_app
    _run(paper_app, context)


@app.command(context_settings=PASS_ON)
def constrained(context: typer.Context) -> None:
    """Check answers of ten JSON schemas in every mode, and measure the cost of the masks."""
    with needs("edge,export,server,worker,bench"):
        from benchmarks.constrained import app as constrained_app
    _run(constrained_app, context)


@app.command(context_settings=PASS_ON)
def first_token(context: typer.Context) -> None:
    """Compare the time to the first token over MQTT and over HTTP."""
    with needs("edge,export,server,api"):
        from benchmarks.first_token import app as first_token_app
    _run(first_token_app, context)


@app.command(context_settings=PASS_ON)
def chat(context: typer.Context) -> None:
    """Measure the turns of a chat and the prompts of a template, with and without reuse."""
    with needs("edge,export,server,worker"):
        from benchmarks.chat import app as chat_app
    _run(chat_app, context)


@app.command(context_settings=PASS_ON)
def links(context: typer.Context) -> None:
    """Compare the modes of a bundle with its whole model elsewhere, over several links."""
    with needs("edge,export,server,worker"):
        from benchmarks.links import app as links_app
    _run(links_app, context)


@app.command(context_settings=PASS_ON)
def drafts(context: typer.Context) -> None:
    """Compare answers with proposals with answers of one token a step."""
    with needs("edge,export,server,worker"):
        from benchmarks.drafts import app as drafts_app
    _run(drafts_app, context)


def _run(benchmark: typer.Typer, context: typer.Context) -> None:
    name = f"fleet bench {context.command.name}"
    benchmark(args=context.args, prog_name=name, standalone_mode=False)


if __name__ == "__main__":
    run_command("fleet", partial(app, prog_name="fleet bench"))
