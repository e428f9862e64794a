"""What is seen of roll-outs, and what follows from it; nothing is changed by looking."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import msgspec
from sqlalchemy import select
from sqlalchemy.orm import Session

from fleet.registry.bundles import serving_workers
from fleet.registry.models import RolloutRecord
from fleet.registry.results import RolloutRow
from fleet.registry.rollouts.canary_analysis import Evidence, examine
from fleet.registry.rollouts.plan import (
    DeviceOutcome,
    RolloutClock,
    RolloutDecision,
    RolloutPlan,
    RolloutStep,
    decide,
    fate_of,
    judge,
)
from fleet.registry.rollouts.repository import candidates, course_of, open_rollouts
from fleet.registry.rollouts.states import OPEN, RolloutState
from fleet.registry.stats.queries import By, StatsQuery, count

BASELINE_S: Final = 86_400.0
"""How long before the roll-out answers of other bundles are compared with."""

CHUNK: Final = 10_000


class Assessment(NamedTuple):
    """What was seen of a roll-out at one moment, and what follows from it."""

    fates: dict[str, tuple[DeviceOutcome, str]]
    num_answers: int
    findings: tuple[str, ...]
    decision: RolloutDecision


class PendingStep(NamedTuple):
    """A decision, and the state and stage that it was taken in."""

    rollout: int
    state: str
    stage: int
    decision: RolloutDecision


def look(db: Session, record: RolloutRecord, now: float, heard_since: float) -> Assessment:
    """What is seen of a roll-out, and what a running one needs."""
    course = course_of(record)
    seen = {each.device: each for each in candidates(db, course.plan.group, now)}
    at = RolloutClock(now, record.stage_at, heard_since)
    fates = {
        device: fate_of(seen[device], before, record.bundle_id, course.plan, at)
        for device, before in course.members.items()
        if device in seen
    }
    if missing := missing_worker(db, record.bundle_id):
        return Assessment(fates, 0, (), RolloutDecision(RolloutStep.MISS, missing))
    if record.state == RolloutState.WAITING:
        return Assessment(fates, 0, (), RolloutDecision(RolloutStep.SERVE, "a worker serves it"))
    if not record.stage:
        return Assessment(fates, 0, (), RolloutDecision(RolloutStep.ADVANCE, "a worker serves it"))
    decision = decide(course, fates, at)
    if (since := course.watched_from) is None:
        return Assessment(fates, 0, (), decision)
    evidence = evidence_of(db, record, plan=course.plan, members=tuple(fates), since=since, now=now)
    watched_s = now - since
    is_final = watched_s >= course.plan.observe_s
    findings = examine(evidence, course.plan.limits, is_final=is_final)
    if decision.step is RolloutStep.WATCH:
        decision = judge(course.plan, findings, evidence.num_answers, watched_s)
    texts = tuple(f"{each.outcome}: {each.text}" for each in findings)
    return Assessment(fates, evidence.num_answers, texts, decision)


def missing_worker(db: Session, bundle_id: str) -> str:
    """What a roll-out waits for; "" when a worker serves the bundle."""
    if bundle_id in serving_workers(db):
        return ""
    return f"no worker serves bundle {bundle_id}: 'fleet up' starts one; elsewhere start one with --bundle"


def evidence_of(
    db: Session,
    record: RolloutRecord,
    plan: RolloutPlan,
    members: tuple[str, ...],
    since: float,
    now: float,
) -> Evidence:
    """Answers of a stage's devices that began at `since` or later, and those to compare with."""
    new = _count(db, StatsQuery(now=now, since=since), members)[record.bundle_id]
    if new["answers"] < plan.limits.min_answers:
        return Evidence(new, Counter(), Counter())
    asked = StatsQuery(now=now, since=record.started_at - BASELINE_S, group=plan.group)
    same = _count(db, asked, members)
    everyone = count(db, By.BUNDLE, asked)
    others = _without(
        {bundle_id: tally.counts for bundle_id, tally in everyone.items()}, record.bundle_id
    )
    return Evidence(new, mine := _without(same, record.bundle_id), others - mine)


def due_steps(db: Session, now: float, heard_since: float) -> list[PendingStep]:
    """What open roll-outs need that are not paused."""
    due = []
    for record in open_rollouts(db):
        if record.state != RolloutState.PAUSED:
            decision = look(db, record, now, heard_since).decision
            is_known = decision.step is RolloutStep.MISS and record.state == RolloutState.WAITING
            if decision.step is not RolloutStep.WAIT and not is_known:
                due.append(PendingStep(record.id, record.state, record.stage, decision))
    return due


def rollout_rows(db: Session, now: float, limit: int) -> list[RolloutRow]:
    """The latest roll-outs, newest first; of those that are open also how far they are."""
    rows = []
    for record in db.scalars(select(RolloutRecord).order_by(RolloutRecord.id.desc()).limit(limit)):
        course = course_of(record)
        seen = (
            look(db, record, now, 0.0)
            if record.state in OPEN
            else Assessment({}, 0, (), RolloutDecision(RolloutStep.WAIT, ""))
        )
        fates = [fate for fate, _ in seen.fates.values()]
        rows.append(
            RolloutRow(
                id=record.id,
                bundle_id=record.bundle_id,
                group=course.plan.group,
                state=record.state,
                stage=record.stage,
                num_stages=course.plan.num_stages,
                num_targets=len(candidates(db, course.plan.group, now)),
                num_told=len(course.members),
                devices={fate: fates.count(fate) for fate in DeviceOutcome},
                answers=seen.num_answers,
                findings=seen.findings,
                reason=record.reason,
                doing=seen.decision.reason if record.state != RolloutState.PAUSED else "",
                started_at=record.started_at,
                stage_at=record.stage_at,
                ended_at=record.ended_at,
                plan=msgspec.to_builtins(course.plan),
            )
        )
    return rows


def _count(
    db: Session, asked: StatsQuery, devices: Sequence[str]
) -> defaultdict[str, Counter[str]]:
    """Counts of some devices by bundle, a chunk after the other: a statement takes only so many parameters."""
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for i in range(0, len(devices), CHUNK):
        chunk = msgspec.structs.replace(asked, devices=tuple(devices[i : i + CHUNK]))
        for bundle_id, tally in count(db, By.BUNDLE, chunk).items():
            counts[bundle_id].update(tally.counts)
    return counts


def _without(counts: Mapping[str, Counter[str]], bundle_id: str) -> Counter[str]:
    """The sums over all other bundles."""
    return sum((each for other, each in counts.items() if other != bundle_id), Counter())
