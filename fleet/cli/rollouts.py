"""`fleet bundle rollout`, `pause`, `resume`, `rollback` and `status`."""

from __future__ import annotations

import time
from typing import Annotated, Final

import typer
from rich.text import Text

from fleet.cli.access import call_fleet
from fleet.cli.bundles import BundleIdArgument
from fleet.cli.options import (
    MAX_COUNT,
    MAX_ROWS,
    GroupOption,
    HomeOption,
    JsonOption,
    checked_group,
    format_span,
    parse_span,
    print_json,
)
from fleet.errors import ConfigError
from fleet.operator_api.bundle_operations import (
    LIST_ROLLOUTS,
    PAUSE_ROLLOUT,
    RESUME_ROLLOUT,
    ROLL_BACK,
    SHOW_ROLLOUT,
    START_ROLLOUT,
    RolloutChoice,
    RolloutKey,
    RolloutQuery,
    RolloutStart,
    RolloutUndoing,
)
from fleet.operator_api.paging import MAX_PAGE
from fleet.registry.results import RolloutRow, bundle_label
from fleet.registry.rollouts.canary_analysis import CanaryLimits
from fleet.registry.rollouts.plan import RolloutPlan, check_plan
from fleet.registry.rollouts.states import RolloutState
from fleet.utils.console import new_console, outside_text
from fleet.utils.printable import count, print_line

BAR_WIDTH: Final = 24
STYLES: Final = {"taken": "green", "failed": "red", "pending": "yellow", "absent": "dim"}
PLAN: Final = RolloutPlan()
LIMITS: Final = CanaryLimits()
STAGES: Final = ",".join(map(str, PLAN.percentages))
OBSERVE: Final = format_span(PLAN.observe_s)
TAKE_WITHIN: Final = format_span(PLAN.take_within_s)
OFFLINE_AFTER: Final = format_span(PLAN.offline_after_s)

RolloutArgument = Annotated[
    int | None,
    typer.Argument(
        min=1, max=MAX_COUNT, metavar="[ID]", help="The roll-out's id (default: the open one)."
    ),
]
UndoneArgument = Annotated[
    int | None,
    typer.Argument(
        min=1,
        max=MAX_COUNT,
        metavar="[ID]",
        help="The roll-out's id (default: the open or newest one).",
    ),
]
AtOnceOption = Annotated[
    bool,
    typer.Option("--at-once", help="After its end: on all devices at once, without comparison."),
]
LimitOption = Annotated[int, typer.Option(min=1, max=MAX_PAGE, help="Number of the latest.")]
CanaryOption = Annotated[
    int, typer.Option(min=1, max=MAX_ROWS, help="Number of devices of the first stage.")
]
CanaryGroupOption = Annotated[
    str | None,
    typer.Option(help="Group of the devices of the first stage.", callback=checked_group),
]
StagesOption = Annotated[str, typer.Option(help="Percentages of devices after the first stage.")]
MaxOffloadIncreaseOption = Annotated[
    float, typer.Option(help="Maximum increase of the offload rate, as a share of tokens.")
]
MaxAgreementDropOption = Annotated[
    float, typer.Option(help="Maximum drop of the agreement, as a share of verified tokens.")
]
MaxErrorRateOption = Annotated[
    float, typer.Option(help="Maximum share of answers that end with an error.")
]
MaxTpotRatioOption = Annotated[
    float, typer.Option(help="Maximum time per token, relative to the previous bundle.")
]
MinAnswersOption = Annotated[
    int,
    typer.Option(
        min=1, max=MAX_ROWS, help="Minimum number of answers before the limits are evaluated."
    ),
]
MaxFailedOption = Annotated[float, typer.Option(help="Maximum share of devices that fail.")]
AgreementSampleOption = Annotated[
    float, typer.Option(help="Share of answers whose tokens the cloud verifies meanwhile.")
]
ObserveOption = Annotated[str, typer.Option(help="Minimum time of observation for each stage.")]
TakeWithinOption = Annotated[str, typer.Option(help="Maximum time to install the bundle.")]
OfflineAfterOption = Annotated[
    str, typer.Option(help="Treat a device as failed after it has been offline this long.")
]


def start_rollout(
    bundle: BundleIdArgument,
    group: GroupOption = None,
    canary: CanaryOption = PLAN.canary,
    canary_group: CanaryGroupOption = None,
    stages: StagesOption = STAGES,
    max_offload_increase: MaxOffloadIncreaseOption = LIMITS.max_offload_increase,
    max_agreement_drop: MaxAgreementDropOption = LIMITS.max_agreement_drop,
    max_error_rate: MaxErrorRateOption = LIMITS.max_error_rate,
    max_tpot_ratio: MaxTpotRatioOption = LIMITS.max_tpot_ratio,
    min_answers: MinAnswersOption = LIMITS.min_answers,
    max_failed: MaxFailedOption = PLAN.max_failed,
    agreement_sample: AgreementSampleOption = PLAN.agreement_sample,
    observe: ObserveOption = OBSERVE,
    take_within: TakeWithinOption = TAKE_WITHIN,
    offline_after: OfflineAfterOption = OFFLINE_AFTER,
    folder: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Bring a bundle to devices, stage by stage, and undo it if it is worse than before."""
    limits = CanaryLimits(
        max_offload_increase=max_offload_increase,
        max_agreement_drop=max_agreement_drop,
        max_error_rate=max_error_rate,
        max_tpot_ratio=max_tpot_ratio,
        min_answers=min_answers,
    )
    plan = RolloutPlan(
        group=group,
        canary=canary,
        canary_group=canary_group,
        percentages=parse_stages(stages),
        limits=limits,
        observe_s=parse_span(observe),
        take_within_s=parse_span(take_within),
        offline_after_s=parse_span(offline_after),
        max_failed=max_failed,
        agreement_sample=agreement_sample,
    )
    row = call_fleet(folder, START_ROLLOUT, RolloutStart(bundle=bundle, plan=check_plan(plan)))
    _print_change(row, "started", as_json=as_json)


def pause_rollout(
    rollout: RolloutArgument = None, folder: HomeOption = None, as_json: JsonOption = False
) -> None:
    """Pause a roll-out; meanwhile it is not undone by itself."""
    row = call_fleet(folder, PAUSE_ROLLOUT, RolloutChoice(rollout=rollout))
    _print_change(row, "paused", as_json=as_json)


def resume_rollout(
    rollout: RolloutArgument = None, folder: HomeOption = None, as_json: JsonOption = False
) -> None:
    """Resume a paused roll-out."""
    row = call_fleet(folder, RESUME_ROLLOUT, RolloutChoice(rollout=rollout))
    _print_change(row, "resumed", as_json=as_json)


def roll_back(
    rollout: UndoneArgument = None,
    at_once: AtOnceOption = False,
    folder: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Undo a roll-out; after its end, bring the previous bundle back, stage by stage."""
    row = call_fleet(folder, ROLL_BACK, RolloutUndoing(rollout=rollout, at_once=at_once))
    is_undone = row.state == RolloutState.UNDONE
    _print_change(row, "undone" if is_undone else "started", as_json=as_json)


def list_rollouts(
    rollout: RolloutArgument = None,
    limit: LimitOption = 5,
    folder: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the latest roll-outs: their progress, their findings, and what they wait for."""
    if rollout is None:
        rows = call_fleet(folder, LIST_ROLLOUTS, RolloutQuery(limit=limit)).rollouts
    else:
        rows = [call_fleet(folder, SHOW_ROLLOUT, RolloutKey(rollout=rollout))]
    if as_json:
        print_json(rows)
        return
    console = new_console()
    for row in rows:
        console.print(progress_text(row, time.time()))
    if not rows:
        console.print("roll-outs: none yet; start one with 'fleet bundle rollout BUNDLE'")


def progress_text(row: RolloutRow, now: float) -> Text:
    """A roll-out in a few lines: its progress, the outcomes of its devices, its findings."""
    targets = f"group {row.group}" if row.group else "all devices"
    label = bundle_label(row.bundle_id, row.bundle_name)
    title = f"roll-out {row.id}: bundle {label} to {targets}, {row.state}"
    lines = [outside_text(title, "bold"), _stage_text(row, now)]
    if any(row.devices.values()):
        lines.append(_outcomes_text(row))
    for finding in row.findings:
        lines.append(outside_text(f"  {finding}", "red" if finding.startswith("worse") else ""))
    if row.doing or row.reason:
        lines.append(outside_text(f"  {row.doing or row.reason}", "dim"))
    return Text("\n").join(lines)


def _stage_text(row: RolloutRow, now: float) -> Text:
    num_reached = row.num_targets if row.state == "completed" else row.num_told
    filled = round(BAR_WIDTH * num_reached / row.num_targets) if row.num_targets else 0
    bar = "█" * filled + "░" * (BAR_WIDTH - filled)
    devices = f"{num_reached} of {count(row.num_targets, 'device')}"
    duration_s = (row.ended_at or now) - row.started_at
    return Text(f"  {bar} stage {row.stage} of {row.num_stages}, {devices}, {duration_s:,.0f} s")


def _outcomes_text(row: RolloutRow) -> Text:
    outcomes = [
        outside_text(f"{count} {outcome}", STYLES.get(outcome, ""))
        for outcome, count in row.devices.items()
        if count
    ]
    return Text("  ") + Text(", ").join(outcomes) + Text(f"; {count(row.answers, 'answer')}")


def parse_stages(text: str) -> tuple[int, ...]:
    """Percentages from text such as "10,50,100"; raises ConfigError."""
    try:
        return tuple(int(percentage) for percentage in text.split(","))
    except ValueError:
        raise ConfigError(f"stages {text!r}: expected percentages such as 10,50,100") from None


def _print_change(row: RolloutRow, participle: str, *, as_json: bool) -> None:
    if as_json:
        print_json(row)
        return
    label = bundle_label(row.bundle_id, row.bundle_name)
    print_line(f"roll-out {row.id} of bundle {label} is {participle}; see 'fleet bundle status'")
    if row.state == "waiting" and row.doing:
        print_line(f"it waits: {row.doing}")


def add_rollout_commands(app: typer.Typer) -> None:
    """Add the commands of this file to `app`."""
    app.command("rollout")(start_rollout)
    app.command("pause")(pause_rollout)
    app.command("resume")(resume_rollout)
    app.command("rollback")(roll_back)
    app.command("status")(list_rollouts)
