"""`fleet plan`: which mode, threshold and split suit a link and two machines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from fleet.planning.advice import DeploymentPlan
from fleet.planning.advice import plan as make_plan
from fleet.planning.cost_model import CLOUD_ONLY, DATA, Load, read_fits
from fleet.protocol.modes import DEFAULT_AGREEMENT


def plan(
    rtt: Annotated[float, typer.Option(help="Round trip between device and broker, in ms.")],
    bandwidth: Annotated[float, typer.Option(help="Each way, in Mbit/s.")],
    edge_step: Annotated[
        float | None,
        typer.Option(
            help="Ms of a token through the whole model on the device (default: as measured)."
        ),
    ] = None,
    cloud_step: Annotated[float | None, typer.Option(help="The same in the cloud.")] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of the prompt (default: as measured).")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Of the answer (default: as measured).")
    ] = None,
    min_agreement: Annotated[
        float, typer.Option(help="With the full model; 0 for any.")
    ] = DEFAULT_AGREEMENT,
    data: Annotated[
        Path, typer.Option(help="Another file of 'fleet bench paper --fit'.", show_default=False)
    ] = DATA,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Say which mode suits a link, what to expect of it, and where cloud-only would be better."""
    load = Load(
        rtt_ms=rtt,
        mbit_s=bandwidth,
        edge_step_ms=edge_step,
        cloud_step_ms=cloud_step,
        prompt_tokens=prompt_tokens,
        tokens=tokens,
        min_agreement=min_agreement,
    )
    made = make_plan(read_fits(data), load)
    if as_json:
        print(msgspec.json.encode(made).decode())
    else:
        print_plan(Console(highlight=False), made)


def print_plan(console: Console, made: DeploymentPlan) -> None:
    """What to expect, the best first, and the advice."""
    has_splits = len({one.exits for one in made.expectations}) > 1
    table = Table(box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    table.add_column("mode", no_wrap=True)
    for header in (
        *(["exits"] if has_splits else []),
        "ttft, ms",
        "ms/token",
        "total, s",
        "KB",
        "trips",
        "cloud",
    ):
        table.add_column(header, justify="right")
    table.add_column("agrees", justify="right")
    for one in made.expectations:
        exits = "-" if one.mode == CLOUD_ONLY else ",".join(map(str, one.exits))
        table.add_row(
            one.name,
            *([exits] if has_splits else []),
            f"{one.ttft_ms:.0f}",
            f"{one.token_ms:.1f}",
            f"{one.total_ms / 1e3:.2f}",
            f"{one.num_bytes / 1e3:,.1f}",
            f"{one.round_trips:.0f}",
            f"{one.offload_rate:.0%}",
            "?" if one.agreement is None else f"{one.agreement:.3f}",
            style=None if one.agrees else "dim",
        )
    console.print(table)
    console.print(made.advice)
    for fit in made.fits:
        exits = ",".join(map(str, fit["exits"]))
        processor = fit["machine"].get("processor")
        errors = fit["errors"]
        console.print(
            f"exits {exits} of {fit['model']}, measured on {processor} with steps of {fit['edge_step_ms']:.1f} ms on "
            f"the device and {fit['cloud_step_ms']:.1f} ms in the cloud; on links that were held back the prediction "
            f"was off by {errors['median']:.1%} in the middle and {errors['highest']:.1%} at most",
            style="dim",
        )
