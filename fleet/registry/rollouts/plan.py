"""Plans of roll-outs and the decisions that follow from them, as plain functions.

Nothing here reads a clock or a database; `fleet.registry.rollouts.steps` does, and applies them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Final, NamedTuple

import msgspec
from msgspec import Meta, Struct

from fleet.errors import RolloutError
from fleet.protocol.report import ConfigProblem
from fleet.protocol.types import Share
from fleet.registry.rollouts.canary_analysis import CanaryLimits, Finding, Outcome
from fleet.utils.validation import describe_error

Positive = Annotated[float, Meta(gt=0, le=1e8)]
MAX_CANARY: Final = 1_000_000
Percentage = Annotated[int, Meta(ge=1, le=100)]


class RolloutPlan(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The plan of a roll-out. The first stage is `canary` devices, or those of `canary_group`.

    Every further stage brings the roll-out to a percentage of its devices: all, or those of
    `group`. A stage's devices have `take_within_s` seconds to install the bundle, and are then
    watched for at least `observe_s` seconds. A device that has installed it and is offline for
    `offline_after_s` seconds has failed; a share of more than `max_failed` of them undoes the
    roll-out. While it lasts, `agreement_sample` is a setting of its devices.

    With `at_once` its first stage is all devices, and it waits for none of them.
    """

    group: str | None = None
    canary: Annotated[int, Meta(ge=1, le=MAX_CANARY)] = 1
    canary_group: str | None = None
    percentages: tuple[Percentage, ...] = (10, 50, 100)
    limits: CanaryLimits = CanaryLimits()
    observe_s: Positive = 600.0
    take_within_s: Positive = 1800.0
    offline_after_s: Positive = 120.0
    max_failed: Share = 0.1
    agreement_sample: Share = 0.25
    at_once: bool = False

    @property
    def num_stages(self) -> int:
        """The number of stages, with the canary."""
        return 1 + len(self.percentages)


def check_plan(plan: RolloutPlan) -> RolloutPlan:
    """Return `plan` itself.

    Raises:
        RolloutError: a value is out of range, or its stages do not lead to all devices.
    """
    values = msgspec.to_builtins(plan)
    try:
        plan = msgspec.convert(values, RolloutPlan)
    except msgspec.ValidationError as error:
        reason = describe_error(error, RolloutPlan, values)
        raise RolloutError(
            f"a roll-out's plan is not usable: {reason}; choose other values"
        ) from None
    stages = plan.percentages
    if not stages or list(stages) != sorted(set(stages)) or stages[-1] != 100:
        shown = ",".join(map(str, stages))
        raise RolloutError(
            f"stages {shown!r}: expected growing percentages that end with 100, such as 10,50,100"
        )
    if plan.group and plan.canary_group not in (None, plan.group):
        raise RolloutError(
            f"the canary's group {plan.canary_group!r} is not in the group {plan.group!r}; "
            "leave one of them out"
        )
    return plan


class PreviousState(Struct, frozen=True, kw_only=True):
    """The state of a device when the roll-out changed its settings at `told_at`.

    `bundle` and `agreement_sample` are settings of the device's own scope, which an undo restores.
    `error` is the message of its `config_error`, `served` the bundle that it served.
    """

    told_at: float
    online: bool = True
    bundle: str | None = None
    agreement_sample: float | None = None
    error: str = ""
    served: str = ""


class RolloutProgress(Struct, frozen=True):
    """The plan of a roll-out, and the devices that it has changed.

    `members` shall serve the bundle; `controls` keep theirs, and only sample their agreement for
    the comparison. The stage's devices are watched since `watched_from`, None while some of them
    install the bundle.
    """

    plan: RolloutPlan
    members: dict[str, PreviousState] = {}
    controls: dict[str, PreviousState] = {}
    watched_from: float | None = None


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """An active device that a roll-out may change, and its newest status."""

    device: str
    group: str | None = None
    online: bool = True
    bundle_id: str = ""
    last_seen: float = 0.0
    problem: ConfigProblem | None = None


def next_stage(
    progress: RolloutProgress, stage: int, candidates: Sequence[Candidate]
) -> tuple[int, list[str]]:
    """Return the next stage after `stage` that adds devices, from 1 on, and those devices.

    Without one, return the number after the last stage. Online devices come first, then by name.
    """
    plan = progress.plan
    ordered = sorted(candidates, key=_order)
    rest = [each for each in ordered if each.device not in progress.members]
    for number in range(stage + 1, plan.num_stages + 1):
        if number == 1:
            new = _canaries(plan, rest)
        else:
            share = plan.percentages[number - 2] / 100
            num_changed = len(ordered) - len(rest)
            new = rest[: max(0, math.ceil(len(ordered) * share) - num_changed)]
        if new:
            return number, [each.device for each in new]
    return plan.num_stages + 1, []


def _canaries(plan: RolloutPlan, candidates: list[Candidate]) -> list[Candidate]:
    if plan.canary_group is None:
        return candidates[: plan.canary]
    return [each for each in candidates if each.group == plan.canary_group]


def controls_for(
    progress: RolloutProgress, candidates: Sequence[Candidate], members: Collection[str]
) -> list[str]:
    """Return online devices for the comparison, as many as there are `members`.

    They keep their bundle, and are chosen once for each roll-out.
    """
    if progress.controls or not progress.plan.agreement_sample:
        return []
    ordered = sorted(candidates, key=_order)
    rest = [each.device for each in ordered if each.online and each.device not in members]
    return rest[: len(members)]


def _order(candidate: Candidate) -> tuple[bool, str]:
    return not candidate.online, candidate.device


class DeviceOutcome(StrEnum):
    """The outcome of a roll-out on one device.

    A device is `absent` if it was already offline when the roll-out changed its settings.
    """

    PENDING = "pending"
    TAKEN = "taken"
    FAILED = "failed"
    ABSENT = "absent"


class ReasonedOutcome(NamedTuple):
    """A device's outcome, and the reason when it has failed."""

    outcome: DeviceOutcome
    reason: str = ""


class RolloutClock(NamedTuple):
    """The times of a decision: `now`, the stage's start, and the start of receiving statuses."""

    now: float
    stage_at: float
    receiving_since: float = 0.0

    @property
    def began(self) -> float:
        """The time since when the stage's devices could report that they installed the bundle."""
        return max(self.stage_at, self.receiving_since)


def outcome_of(
    candidate: Candidate,
    previous: PreviousState,
    bundle_id: str,
    plan: RolloutPlan,
    clock: RolloutClock,
) -> ReasonedOutcome:
    """Return the outcome of a roll-out of `bundle_id` on a device."""
    device = candidate.device
    offline_s = 0.0
    if not candidate.online:
        offline_s = clock.now - max(candidate.last_seen, clock.receiving_since)
    is_gone = offline_s >= plan.offline_after_s
    problem = candidate.problem
    if problem and problem.is_final and problem.message != previous.error:
        return ReasonedOutcome(DeviceOutcome.FAILED, f"{device} reports: {problem.message}")
    if is_gone and candidate.last_seen < previous.told_at:
        return ReasonedOutcome(DeviceOutcome.ABSENT)
    if candidate.bundle_id == bundle_id:
        if is_gone:
            return ReasonedOutcome(DeviceOutcome.FAILED, f"{device} went offline with the bundle")
        return ReasonedOutcome(DeviceOutcome.TAKEN)
    since = max(clock.began, previous.told_at, 0.0 if previous.online else candidate.last_seen)
    if clock.now >= since + plan.take_within_s:
        reason = f"{device} has not installed the bundle within {plan.take_within_s:g} s"
        return ReasonedOutcome(DeviceOutcome.FAILED, reason)
    return ReasonedOutcome(DeviceOutcome.PENDING)


class RolloutStep(StrEnum):
    """The next step of a roll-out.

    `SERVE`: a worker serves its bundle now. `MISS`: no worker serves it any more.
    """

    SERVE = "serve"
    MISS = "miss"
    WAIT = "wait"
    WATCH = "watch"
    ADVANCE = "advance"
    UNDO = "undo"
    FAIL = "fail"


class RolloutDecision(NamedTuple):
    """A step, and its reason."""

    step: RolloutStep
    reason: str


def decide_step(
    progress: RolloutProgress, outcomes: Mapping[str, ReasonedOutcome], clock: RolloutClock
) -> RolloutDecision:
    """Return the step while a stage's devices install the bundle; `WATCH` when they have."""
    plan = progress.plan
    present = [each for each in outcomes.values() if each.outcome is not DeviceOutcome.ABSENT]
    failed = [each.reason for each in present if each.outcome is DeviceOutcome.FAILED]
    if len(failed) > plan.max_failed * len(present):
        more = f" ({len(failed)} of {len(present)} devices failed)" if len(present) > 1 else ""
        return RolloutDecision(RolloutStep.UNDO, failed[0] + more)
    num_taken = sum(each.outcome is DeviceOutcome.TAKEN for each in present)
    taken = f"{num_taken} of {len(outcomes)} devices have installed the bundle"
    if any(each.outcome is DeviceOutcome.PENDING for each in present):
        return RolloutDecision(RolloutStep.WAIT, taken)
    if num_taken:
        return RolloutDecision(RolloutStep.WATCH, taken)
    if clock.now < clock.began + plan.take_within_s:
        return RolloutDecision(RolloutStep.WAIT, "its devices are offline")
    reason = f"no device was online to install the bundle within {plan.take_within_s:g} s"
    return RolloutDecision(RolloutStep.FAIL, reason)


def judge(
    plan: RolloutPlan, findings: Iterable[Finding], num_answers: int, watched_s: float
) -> RolloutDecision:
    """Return the step of a stage that has been watched for `watched_s` seconds.

    `num_answers` is the number of its answers in that time.
    """
    all_findings = list(findings)
    if worse := [each.text for each in all_findings if each.outcome is Outcome.WORSE]:
        return RolloutDecision(RolloutStep.UNDO, "; ".join(worse))
    if watched_s < plan.observe_s:
        reason = f"watched for {max(0.0, watched_s):.0f} of {plan.observe_s:g} s"
        return RolloutDecision(RolloutStep.WAIT, reason)
    if num_answers < plan.limits.min_answers:
        reason = f"{num_answers} of {plan.limits.min_answers} answers"
        return RolloutDecision(RolloutStep.WAIT, reason)
    if unsure := [each.text for each in all_findings if each.outcome is Outcome.UNSURE]:
        reason = "not enough answers to decide: " + "; ".join(unsure)
        return RolloutDecision(RolloutStep.WAIT, reason)
    return RolloutDecision(RolloutStep.ADVANCE, "no worse than before")
