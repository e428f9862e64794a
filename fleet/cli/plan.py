"""`fleet plan`: the mode, threshold and split for a link and two machines."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich import box
from rich.console import Console

from fleet.bundles.manifest import read_manifest
from fleet.cli.fitted_table import FittedTable
from fleet.cli.options import MAX_ROWS, BundleOption, JsonOption, print_json
from fleet.errors import ConfigError
from fleet.planning.advice import DeploymentPlan, plan_deployment
from fleet.planning.cost_model import (
    CLOUD_ONLY,
    DATA,
    ON_DEVICE,
    STANDALONE,
    CostFit,
    Expectation,
    PlanRequest,
    read_fits,
)
from fleet.planning.machine_speeds import read_speeds
from fleet.planning.splits import AT_MOST, INTERPOLATED, split_fits, worker_speeds
from fleet.protocol.modes import DEFAULT_AGREEMENT
from fleet.server.supervisor import resolve_bundle
from fleet.utils.console import new_console
from fleet.utils.path_options import path_option

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
MachineOption = Annotated[
    Path | None,
    path_option(help="Device, from 'edge-agent measure'; compares a bundle's splits on it."),
]
WorkerOption = Annotated[
    Path | None,
    path_option(help="Worker, from its command 'measure' (default: as measured)."),
]
MemoryOption = Annotated[
    int | None,
    typer.Option(min=1, max=MAX_ROWS, help="Memory of the device for the model, in MB."),
]
DataOption = Annotated[
    Path, path_option(help="Another file of 'fleet bench paper --fit'.", show_default=False)
]


HEADERS: Final = ("ttft, ms", "ms/token", "total, s", "KB", "trips", "cloud", "agrees")
NO_SPLIT: Final = (CLOUD_ONLY, ON_DEVICE)
MARKS: Final = {INTERPOLATED: "~", AT_MOST: "≤"}
LEGENDS: Final = {
    INTERPOLATED: "~ is interpolated between measured exits.",
    AT_MOST: "≤ holds if no draft is accepted: no agreement of the exits was measured.",
}


def plan(
    rtt: RttOption,
    bandwidth: BandwidthOption,
    edge_step: EdgeStepOption = None,
    cloud_step: CloudStepOption = None,
    prompt_tokens: PromptTokensOption = None,
    tokens: TokensOption = None,
    min_agreement: MinAgreementOption = DEFAULT_AGREEMENT,
    machine: MachineOption = None,
    worker: WorkerOption = None,
    bundle: BundleOption = None,
    device_memory: MemoryOption = None,
    data: DataOption = DATA,
    as_json: JsonOption = False,
) -> None:
    """Recommend a mode and a split for a link, or the whole model on one side."""
    request = PlanRequest(
        rtt_ms=rtt,
        mbit_s=bandwidth,
        edge_step_ms=edge_step,
        cloud_step_ms=cloud_step,
        prompt_tokens=prompt_tokens,
        tokens=tokens,
        min_agreement=min_agreement,
        device_memory_mb=device_memory,
    )
    fits = read_fits(data)
    if machine:
        fits = fits_of_machine(fits, machine, worker, bundle)
    elif worker or bundle:
        raise ConfigError(
            "--worker and --bundle need the device's speeds: measure them there with "
            "'edge-agent measure BUNDLE --out FILE', and pass --machine FILE"
        )
    deployment = plan_deployment(fits, request)
    if as_json:
        print_json(deployment)
    else:
        print_plan(new_console(), deployment)


def fits_of_machine(
    fits: Sequence[CostFit], machine: Path, worker: Path | None, bundle: Path | None
) -> tuple[CostFit, ...]:
    """Return a cost model for each split of a bundle between two machines.

    Raises:
        ConfigError: a file of speeds is unusable, or of another model.
    """
    manifest = read_manifest(resolve_bundle(bundle, lambda line: print(line, file=sys.stderr)))
    device = read_speeds(machine, "device", manifest)
    measured = read_speeds(worker, "worker", manifest) if worker else None
    return split_fits(manifest, device, measured or worker_speeds(fits[0], manifest), fits[0])


def print_plan(console: Console, plan: DeploymentPlan) -> None:
    """Print the expectations, the best first, the advice, and the measurements behind them."""
    console.print(_expectations_table(plan))
    console.print(plan.advice)
    bases = {each.basis for each in plan.expectations}
    for basis in sorted(bases & LEGENDS.keys()):
        console.print(LEGENDS[basis], style="dim")
    for fit in plan.fits if plan.fits[0]["errors"] else plan.fits[:1]:
        console.print(_origin_line(fit), style="dim")


def _origin_line(fit: dict[str, Any]) -> str:
    """Return the machines that a table holds for, and the errors where they were measured."""
    exits = ",".join(map(str, fit["exits"]))
    errors = fit["errors"]
    origin = (
        f"exits {exits} of {fit['model']}, measured on {fit['machine'].get('processor')} "
        f"with steps of {fit['edge_step_ms']:.1f} ms on the device and "
        f"{fit['cloud_step_ms']:.1f} ms in the cloud"
    )
    if not errors:
        return origin
    return (
        f"{origin}; on held-out links the median error of the prediction was "
        f"{errors['median']:.1%}, the largest {errors['highest']:.1%}"
    )


def _expectations_table(plan: DeploymentPlan) -> FittedTable:
    table = FittedTable(box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    splits = [each for each in plan.expectations if each.mode not in NO_SPLIT]
    has_splits = len({each.exits for each in splits}) > 1
    table.add_column("mode", no_wrap=True)
    for header in ("split", *HEADERS) if has_splits else HEADERS:
        table.add_column(header, justify="right")
    for each in plan.expectations:
        split = "-" if each.mode in NO_SPLIT else _split_name(each, splits)
        cells = [each.name, *([split] if has_splits else []), *_expected_values(each)]
        table.add_row(*cells, style=None if each.agrees else "dim")
    return table


def _split_name(expectation: Expectation, splits: Sequence[Expectation]) -> str:
    """Return the layers of a device, or the exits where several splits have as many."""
    is_unique = len({each.split_layer for each in splits}) == len({each.exits for each in splits})
    return str(expectation.split_layer) if is_unique else ",".join(map(str, expectation.exits))


def _expected_values(expectation: Expectation) -> list[str]:
    is_alone = expectation.mode == STANDALONE
    mark = MARKS.get(expectation.basis, "")
    agreement = "?" if expectation.agreement is None else f"{expectation.agreement:.3f}"
    return [
        f"{expectation.ttft_ms:.0f}",
        f"{expectation.token_ms:.1f}",
        f"{expectation.total_ms / 1e3:.2f}",
        f"{expectation.num_bytes / 1e3:,.1f}",
        f"{'' if is_alone else mark}{expectation.round_trips:.0f}",
        f"{expectation.offload_rate:.0%}",
        f"{mark if is_alone else ''}{agreement}",
    ]
