"""`fleet bundle rollout`, `pause`, `resume`, `rollback` and `status`."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import typer
from rich.console import Console
from rich.text import Text

from fleet.cli.stats import GroupOption, JsonOption, StateOption
from fleet.errors import ConfigError
from fleet.server.home import FleetHome
from fleet.utils.optional_imports import load

BAR_WIDTH: Final = 24
UNITS_S: Final = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
STYLES: Final = {"taken": "green", "failed": "red", "pending": "yellow", "absent": "dim"}

RolloutArgument = Annotated[
    int | None, typer.Argument(metavar="[ID]", help="Of the roll-out; else the open one.")
]
CanaryOption = Annotated[int | None, typer.Option(help="How many devices come first (default 1).")]


def rollout(
    bundle_id: Annotated[
        str, typer.Argument(metavar="BUNDLE", help="A bundle's id; see `fleet bundle list`.")
    ],
    group: GroupOption = None,
    canary: CanaryOption = None,
    canary_group: Annotated[
        str | None, typer.Option(help="A group whose devices come first.")
    ] = None,
    stages: Annotated[
        str | None, typer.Option(help="Percentages after the canary (default 10,50,100).")
    ] = None,
    max_offload_increase: Annotated[
        float | None, typer.Option(help="Share of tokens (default 0.1).")
    ] = None,
    max_agreement_drop: Annotated[
        float | None, typer.Option(help="Share of judged tokens (default 0.05).")
    ] = None,
    max_error_rate: Annotated[
        float | None, typer.Option(help="Share of answers (default 0.05).")
    ] = None,
    max_tpot_ratio: Annotated[
        float | None, typer.Option(help="Times the time a token (default 1.5).")
    ] = None,
    min_answers: Annotated[
        int | None, typer.Option(help="Nothing is judged before (default 20).")
    ] = None,
    max_failed: Annotated[
        float | None, typer.Option(help="Share of devices that may fail (default 0.1).")
    ] = None,
    agreement_sample: Annotated[
        float | None,
        typer.Option(help="Share of answers that the cloud judges meanwhile (default 0.25)."),
    ] = None,
    observe: Annotated[
        str | None, typer.Option(help="How long a stage is watched at least (default 10m).")
    ] = None,
    take_within: Annotated[
        str | None, typer.Option(help="Time to take the bundle (default 30m).")
    ] = None,
    offline_after: Annotated[
        str | None, typer.Option(help="A device has failed when it is so (default 2m).")
    ] = None,
    state: StateOption = None,
    as_json: JsonOption = False,
) -> None:
    """Bring a bundle to devices, stage by stage; what is worse than before is undone by itself."""
    limits = {
        "max_offload_increase": max_offload_increase,
        "max_agreement_drop": max_agreement_drop,
        "max_error_rate": max_error_rate,
        "max_tpot_ratio": max_tpot_ratio,
        "min_answers": min_answers,
    }
    values = {
        "group": group,
        "canary": canary,
        "canary_group": canary_group,
        "percentages": stages and parse_stages(stages),
        "max_failed": max_failed,
        "agreement_sample": agreement_sample,
        "observe_s": observe and parse_span(observe),
        "take_within_s": take_within and parse_span(take_within),
        "offline_after_s": offline_after and parse_span(offline_after),
    }
    plan = load("fleet.registry.rollouts.plan").RolloutPlan(
        limits=load("fleet.registry.rollouts.canary_analysis").CanaryLimits(**_given(limits)),
        **_given(values),
    )
    with FleetHome.load(state or FleetHome.default_folder()).registry() as registry:
        number = registry.start_rollout(bundle_id, plan)
        row = next(row for row in registry.rollouts() if row.id == number)
    _say(row, "begun", as_json=as_json)


def pause(
    rollout: RolloutArgument = None, state: StateOption = None, as_json: JsonOption = False
) -> None:
    """Let a roll-out stand where it is; nothing is undone by itself meanwhile."""
    _change(rollout, "pause", "paused", state, as_json=as_json)


def resume(
    rollout: RolloutArgument = None, state: StateOption = None, as_json: JsonOption = False
) -> None:
    """Let a paused roll-out go on."""
    _change(rollout, "resume", "resumed", state, as_json=as_json)


def rollback(
    rollout: RolloutArgument = None, state: StateOption = None, as_json: JsonOption = False
) -> None:
    """Undo a roll-out: its devices get back what was wanted of them before."""
    _change(rollout, "undo", "undone", state, as_json=as_json)


def status(
    rollout: RolloutArgument = None,
    limit: Annotated[int, typer.Option(min=1, help="How many of the latest.")] = 5,
    state: StateOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the latest roll-outs: how far they are, what was found, and what they wait for."""
    with FleetHome.load(state or FleetHome.default_folder()).registry() as registry:
        rows = registry.rollouts(limit=10_000 if rollout is not None else limit)
    if rollout is not None:
        rows = [row for row in rows if row.id == rollout]
        if not rows:
            raise ConfigError(f"unknown roll-out {rollout}; see 'fleet bundle status'")
    if as_json:
        print(msgspec.json.encode(rows).decode())
        return
    console = Console(highlight=False)
    for row in rows:
        console.print(progress(row, time.time()))
    if not rows:
        console.print("roll-outs: none yet; begin one with 'fleet bundle rollout BUNDLE'")


def progress(row: Any, now: float) -> Text:
    """A roll-out in a few lines: how many devices it has come to, what has become of them, what was found."""
    told = row.num_targets if row.state == "completed" else row.num_told
    filled = round(BAR_WIDTH * told / row.num_targets) if row.num_targets else 0
    whom = f"group {row.group}" if row.group else "all devices"
    since_s = (row.ended_at or now) - row.started_at
    lines = [
        Text(f"roll-out {row.id}: bundle {row.bundle_id} to {whom}, {row.state}", "bold"),
        Text(
            f"  {'█' * filled}{'░' * (BAR_WIDTH - filled)} stage {row.stage} of {row.num_stages}, "
            f"{told} of {row.num_targets} devices, {since_s:,.0f} s"
        ),
    ]
    if any(row.devices.values()):
        parts = [Text(f"{n} {fate}", STYLES.get(fate, "")) for fate, n in row.devices.items() if n]
        lines.append(Text("  ") + Text(", ").join(parts) + Text(f"; {row.answers:,} answers"))
    lines += [
        Text(f"  {finding}", "red" if finding.startswith("worse") else "")
        for finding in row.findings
    ]
    if row.doing or row.reason:
        lines.append(Text(f"  {row.doing or row.reason}", "dim"))
    return Text("\n").join(lines)


def parse_stages(value: str) -> tuple[int, ...]:
    """Percentages out of "10,50,100"; raises ConfigError."""
    try:
        return tuple(int(part) for part in value.split(","))
    except ValueError:
        raise ConfigError(f"stages {value!r}: expected percentages such as 10,50,100") from None


def parse_span(value: str) -> float:
    """Seconds of "30s", "10m" or "2h"; raises ConfigError."""
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", value):
        return float(match[1]) * UNITS_S[match[2]]
    raise ConfigError(f"span {value!r}: expected a number with its unit, such as 30s, 10m or 2h")


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _change(
    rollout: int | None, event: str, done: str, state: Path | None, *, as_json: bool
) -> None:
    with FleetHome.load(state or FleetHome.default_folder()).registry() as registry:
        number = registry.change_rollout(
            rollout, load("fleet.registry.rollouts.states").RolloutEvent(event)
        )
        row = next(row for row in registry.rollouts(limit=10_000) if row.id == number)
    _say(row, done, as_json=as_json)


def _say(row: Any, done: str, *, as_json: bool) -> None:
    if as_json:
        print(msgspec.json.encode(row).decode())
    else:
        print(f"roll-out {row.id} of bundle {row.bundle_id} is {done}; see 'fleet bundle status'")
        if row.state == "waiting" and row.doing:
            print(f"it waits: {row.doing}")


def add_rollout_commands(app: typer.Typer) -> None:
    """Mounts the commands of this file."""
    for command in (rollout, pause, resume, rollback, status):
        app.command(command.__name__)(command)
