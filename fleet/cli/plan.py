"""`fleet plan`: the mode, threshold and split for a link and two machines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console

from fleet.cli.console import new_console
from fleet.cli.fitted_table import FittedTable
from fleet.cli.options import MAX_ROWS, JsonOption, print_json
from fleet.planning.advice import DeploymentPlan, plan_deployment
from fleet.planning.cost_model import CLOUD_ONLY, DATA, Expectation, PlanRequest, read_fits
from fleet.protocol.modes import DEFAULT_AGREEMENT

RttOption = Annotated[float, typer.Option(help="Round trip between device and broker, in ms.")]
BandwidthOption = Annotated[float, typer.Option(help="Bandwidth each way, in Mbit/s.")]
EdgeStepOption = Annotated[
    float | None,
    typer.Option(help="Ms per token of the whole model on the device (default: as measured)."),
]
CloudStepOption = Annotated[
    float | None, typer.Option(help="Ms per token in the cloud (default: as measured).")
]
PromptTokensOption = Annotated[
    int | None,
    typer.Option(min=1, max=MAX_ROWS, help="Tokens of the prompt (default: as measured)."),
]
TokensOption = Annotated[
    int | None,
    typer.Option(min=1, max=MAX_ROWS, help="Tokens of the answer (default: as measured)."),
]
MinAgreementOption = Annotated[
    float, typer.Option(help="Minimum agreement with the full model; 0 for any.")
]
DataOption = Annotated[
    Path, typer.Option(help="Another file of 'fleet bench paper --fit'.", show_default=False)
]


def plan(
    rtt: RttOption,
    bandwidth: BandwidthOption,
    edge_step: EdgeStepOption = None,
    cloud_step: CloudStepOption = None,
    prompt_tokens: PromptTokensOption = None,
    tokens: TokensOption = None,
    min_agreement: MinAgreementOption = DEFAULT_AGREEMENT,
    data: DataOption = DATA,
    as_json: JsonOption = False,
) -> None:
    """Recommend a mode for a link, with the expected latency, and compare it with cloud-only."""
    request = PlanRequest(
        rtt_ms=rtt,
        mbit_s=bandwidth,
        edge_step_ms=edge_step,
        cloud_step_ms=cloud_step,
        prompt_tokens=prompt_tokens,
        tokens=tokens,
        min_agreement=min_agreement,
    )
    deployment = plan_deployment(read_fits(data), request)
    if as_json:
        print_json(deployment)
    else:
        print_plan(new_console(), deployment)


def print_plan(console: Console, plan: DeploymentPlan) -> None:
    """Print the expectations, the best first, the advice, and the measurements behind them."""
    console.print(_expectations_table(plan))
    console.print(plan.advice)
    for fit in plan.fits:
        exits = ",".join(map(str, fit["exits"]))
        errors = fit["errors"]
        console.print(
            f"exits {exits} of {fit['model']}, measured on {fit['machine'].get('processor')} "
            f"with steps of {fit['edge_step_ms']:.1f} ms on the device and "
            f"{fit['cloud_step_ms']:.1f} ms in the cloud; on held-out links the median error of "
            f"the prediction was {errors['median']:.1%}, the largest {errors['highest']:.1%}",
            style="dim",
        )


def _expectations_table(plan: DeploymentPlan) -> FittedTable:
    table = FittedTable(box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    has_splits = len({each.exits for each in plan.expectations}) > 1
    table.add_column("mode", no_wrap=True)
    if has_splits:
        table.add_column("exits", justify="right")
    for header in ("ttft, ms", "ms/token", "total, s", "KB", "trips", "cloud", "agrees"):
        table.add_column(header, justify="right")
    for each in plan.expectations:
        exits = "-" if each.mode == CLOUD_ONLY else ",".join(map(str, each.exits))
        cells = [each.name, *([exits] if has_splits else []), *_expected_values(each)]
        table.add_row(*cells, style=None if each.agrees else "dim")
    return table


def _expected_values(expectation: Expectation) -> list[str]:
    return [
        f"{expectation.ttft_ms:.0f}",
        f"{expectation.token_ms:.1f}",
        f"{expectation.total_ms / 1e3:.2f}",
        f"{expectation.num_bytes / 1e3:,.1f}",
        f"{expectation.round_trips:.0f}",
        f"{expectation.offload_rate:.0%}",
        "?" if expectation.agreement is None else f"{expectation.agreement:.3f}",
    ]
