"""Roll-outs: what is planned, and what to do next, as plain functions.

Nothing here reads a clock or a database; `fleet.registry.rollouts.steps` does, and acts.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta, Struct

from fleet.errors import RolloutError
from fleet.protocol.prompt import Share
from fleet.protocol.report import NOT_YET
from fleet.registry.rollouts.canary_analysis import CanaryLimits, Finding, Outcome

Positive = Annotated[float, Meta(gt=0, le=1e8)]
Percentage = Annotated[int, Meta(ge=1, le=100)]


class RolloutPlan(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What an operator asked for. The first stage are `canary` devices, or those of `canary_group`.

    Every further stage brings the roll-out to a percentage of its devices: all, or those of `group`. A stage's devices
    have `take_within_s` seconds to take the bundle, and are then watched for `observe_s` seconds at least. A device
    that has taken it and is offline for `offline_after_s` seconds has failed; more than `max_failed` of them, as a
    share, undo the roll-out. While it lasts, `agreement_sample` is a setting of its devices.
    """

    group: str | None = None
    canary: Annotated[int, Meta(ge=1, le=1_000_000)] = 1
    canary_group: str | None = None
    percentages: tuple[Percentage, ...] = (10, 50, 100)
    limits: CanaryLimits = CanaryLimits()
    observe_s: Positive = 600.0
    take_within_s: Positive = 1800.0
    offline_after_s: Positive = 120.0
    max_failed: Share = 0.1
    agreement_sample: Share = 0.25

    @property
    def num_stages(self) -> int:
        return 1 + len(self.percentages)


def check_plan(plan: RolloutPlan) -> RolloutPlan:
    """`plan` itself; raises RolloutError when a value is out of range, or its stages do not lead to all devices."""
    try:
        plan = msgspec.convert(msgspec.to_builtins(plan), RolloutPlan)
    except msgspec.ValidationError as error:
        raise RolloutError(
            f"a roll-out's plan is not usable: {error}; choose other values"
        ) from None
    stages = plan.percentages
    if not stages or list(stages) != sorted(set(stages)) or stages[-1] != 100:
        shown = ",".join(map(str, stages))
        raise RolloutError(
            f"stages {shown!r}: expected growing percentages that end with 100, such as 10,50,100"
        )
    if plan.group and plan.canary_group not in (None, plan.group):
        raise RolloutError(
            f"the canary's group {plan.canary_group!r} is not in the group {plan.group!r}; leave one of them out"
        )
    return plan


class PreviousState(Struct, frozen=True, kw_only=True):
    """What a roll-out found when it told a device at `told_at`, and puts back: settings of the device's own scope.

    `served` is the bundle that the device said it served.
    """

    told_at: float
    online: bool = True
    bundle: str | None = None
    agreement_sample: float | None = None
    error: str = ""
    served: str = ""


class RolloutProgress(Struct, frozen=True):
    """What is kept of a roll-out beside its state: the plan, and the devices that it has told.

    `members` shall serve the bundle; `controls` keep theirs and are only asked for their agreement, so that there is
    something to compare with. The stage's devices are watched since `watched_from`, None while some take the bundle.
    """

    plan: RolloutPlan
    members: dict[str, PreviousState] = {}
    controls: dict[str, PreviousState] = {}
    watched_from: float | None = None


class Candidate(NamedTuple):
    """An active device that a roll-out may come to, and what it said last."""

    device: str
    group: str | None = None
    online: bool = True
    bundle_id: str = ""
    last_seen: float = 0.0
    error: str = ""


def next_stage(
    course: RolloutProgress, stage: int, candidates: Sequence[Candidate]
) -> tuple[int, list[str]]:
    """The next stage after `stage` that adds devices, from 1 on, and those; behind the last stage when none does.

    Devices that are online come first, then by name.
    """
    plan = course.plan
    ordered = [each for each in sorted(candidates, key=_order) if each.device not in course.members]
    for number in range(stage + 1, plan.num_stages + 1):
        if number == 1:
            named = [each for each in ordered if plan.canary_group in (None, each.group)]
            new = named if plan.canary_group else named[: plan.canary]
        else:
            share = plan.percentages[number - 2] / 100
            told = len(candidates) - len(ordered)
            new = ordered[: max(0, math.ceil(len(candidates) * share) - told)]
        if new:
            return number, [each.device for each in new]
    return plan.num_stages + 1, []


def controls_for(
    course: RolloutProgress, candidates: Sequence[Candidate], members: Collection[str]
) -> list[str]:
    """As many devices as there are `members`, that keep their bundle and are compared with; once a roll-out."""
    if course.controls or not course.plan.agreement_sample:
        return []
    rest = [
        each.device
        for each in sorted(candidates, key=_order)
        if each.online and each.device not in members
    ]
    return rest[: len(members)]


def _order(candidate: Candidate) -> tuple[bool, str]:
    return not candidate.online, candidate.device


class DeviceOutcome(StrEnum):
    """What has become of the bundle on one device. One that is `absent` was away already when it was told."""

    PENDING = "pending"
    TAKEN = "taken"
    FAILED = "failed"
    ABSENT = "absent"


class RolloutClock(NamedTuple):
    """When a decision is taken: `now`, the stage's start, and since when devices' statuses are heard at all."""

    now: float
    stage_at: float
    heard_since: float = 0.0

    @property
    def began(self) -> float:
        """Since when the stage's devices could have taken the bundle, and we would know."""
        return max(self.stage_at, self.heard_since)


def fate_of(
    seen: Candidate, before: PreviousState, bundle_id: str, plan: RolloutPlan, at: RolloutClock
) -> tuple[DeviceOutcome, str]:
    """What has become of `bundle_id` on a device, and why if it has failed."""
    offline_s = 0.0 if seen.online else at.now - max(seen.last_seen, at.heard_since)
    is_gone = offline_s >= plan.offline_after_s
    if seen.error and seen.error != before.error and not seen.error.startswith(NOT_YET):
        return DeviceOutcome.FAILED, f"{seen.device} reports: {seen.error}"
    if is_gone and seen.last_seen < before.told_at:
        return DeviceOutcome.ABSENT, ""
    if seen.bundle_id == bundle_id:
        return (
            (DeviceOutcome.FAILED, f"{seen.device} took it and went offline")
            if is_gone
            else (DeviceOutcome.TAKEN, "")
        )
    since = max(at.began, before.told_at, 0.0 if before.online else seen.last_seen)
    if at.now >= since + plan.take_within_s:
        return (
            DeviceOutcome.FAILED,
            f"{seen.device} has not taken it within {plan.take_within_s:g} s",
        )
    return DeviceOutcome.PENDING, ""


class RolloutStep(StrEnum):
    """What to do with a roll-out; `SERVE` and `MISS` say that a worker serves its bundle now, or none any more."""

    SERVE = "serve"
    MISS = "miss"
    WAIT = "wait"
    WATCH = "watch"
    ADVANCE = "advance"
    UNDO = "undo"
    FAIL = "fail"


class RolloutDecision(NamedTuple):
    step: RolloutStep
    reason: str


def decide(
    course: RolloutProgress, fates: Mapping[str, tuple[DeviceOutcome, str]], at: RolloutClock
) -> RolloutDecision:
    """What to do while a stage's devices take the bundle; `WATCH` means that they have."""
    plan = course.plan
    here = {device: fate for device, fate in fates.items() if fate[0] is not DeviceOutcome.ABSENT}
    failed = [why for fate, why in here.values() if fate is DeviceOutcome.FAILED]
    if len(failed) > plan.max_failed * len(here):
        more = f" ({len(failed)} of {len(here)} devices failed)" if len(here) > 1 else ""
        return RolloutDecision(RolloutStep.UNDO, failed[0] + more)
    num_taken = sum(fate is DeviceOutcome.TAKEN for fate, _ in here.values())
    if any(fate is DeviceOutcome.PENDING for fate, _ in here.values()):
        return RolloutDecision(
            RolloutStep.WAIT, f"{num_taken} of {len(fates)} devices have taken it"
        )
    if not num_taken:
        if at.now >= at.began + plan.take_within_s:
            return RolloutDecision(
                RolloutStep.FAIL, f"no device was there to take it within {plan.take_within_s:g} s"
            )
        return RolloutDecision(RolloutStep.WAIT, "its devices are offline")
    return RolloutDecision(RolloutStep.WATCH, f"{num_taken} of {len(fates)} devices have taken it")


def judge(
    plan: RolloutPlan, findings: Iterable[Finding], num_answers: int, watched_s: float
) -> RolloutDecision:
    """What to do with a stage that has been watched for `watched_s` seconds, and given `num_answers` answers."""
    found = list(findings)
    if worse := [each for each in found if each.outcome is Outcome.WORSE]:
        return RolloutDecision(RolloutStep.UNDO, "; ".join(each.text for each in worse))
    if watched_s < plan.observe_s:
        return RolloutDecision(
            RolloutStep.WAIT, f"watched for {max(0.0, watched_s):.0f} of {plan.observe_s:g} s"
        )
    if num_answers < plan.limits.min_answers:
        return RolloutDecision(
            RolloutStep.WAIT, f"{num_answers} of {plan.limits.min_answers} answers"
        )
    if unsure := [each for each in found if each.outcome is Outcome.UNSURE]:
        return RolloutDecision(
            RolloutStep.WAIT,
            "not enough answers to be sure: " + "; ".join(each.text for each in unsure),
        )
    return RolloutDecision(RolloutStep.ADVANCE, "no worse than before")
