"""Assessments of roll-outs and the steps that follow from them; nothing is changed here."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import msgspec
from sqlalchemy import select
from sqlalchemy.orm import Session

from fleet.registry.models import BundleRecord, RolloutRecord
from fleet.registry.results import RolloutRow
from fleet.registry.rollouts.bundles import missing_worker
from fleet.registry.rollouts.canary_analysis import Evidence, examine_modes
from fleet.registry.rollouts.plan import (
    DeviceOutcome,
    ReasonedOutcome,
    RolloutClock,
    RolloutDecision,
    RolloutPlan,
    RolloutProgress,
    RolloutStep,
    decide_step,
    judge,
    outcome_of,
)
from fleet.registry.rollouts.records import candidates, open_rollouts, progress_of
from fleet.registry.rollouts.states import OPEN, RolloutState
from fleet.registry.stats.queries import StatsQuery, counts_by_mode
from fleet.registry.stats.rollup_columns import UNKNOWN_MODE

BASELINE_S: Final = 86_400.0
"""The time before the roll-out whose answers of other bundles are compared with."""

CHUNK_SIZE: Final = 10_000


class Assessment(NamedTuple):
    """The state of a roll-out at one moment, and the decision that follows."""

    decision: RolloutDecision
    outcomes: dict[str, ReasonedOutcome] = {}
    num_answers: int = 0
    findings: tuple[str, ...] = ()


class PendingStep(NamedTuple):
    """A decision, and the state and stage in which it was made."""

    rollout: int
    state: str
    stage: int
    decision: RolloutDecision


def assess(db: Session, record: RolloutRecord, now: float, receiving_since: float) -> Assessment:
    """Return the assessment of a roll-out that is open."""
    progress = progress_of(record)
    clock = RolloutClock(now, record.stage_at, receiving_since)
    outcomes = _outcomes(db, record, progress, clock)
    if missing := missing_worker(db, record.bundle_id):
        return Assessment(RolloutDecision(RolloutStep.MISS, missing), outcomes)
    if record.state == RolloutState.WAITING:
        return Assessment(RolloutDecision(RolloutStep.SERVE, "a worker serves it"), outcomes)
    if not record.stage:
        return Assessment(RolloutDecision(RolloutStep.ADVANCE, "a worker serves it"), outcomes)
    if progress.plan.at_once:
        return Assessment(RolloutDecision(RolloutStep.ADVANCE, "at once"), outcomes)
    decision = decide_step(progress, outcomes, clock)
    if progress.watched_from is None:
        return Assessment(decision, outcomes)
    plan = progress.plan
    evidence = evidence_by_mode(
        db, record, plan=plan, members=tuple(outcomes), since=progress.watched_from, now=now
    )
    watched_s = now - progress.watched_from
    findings = examine_modes(evidence, plan.limits, is_final=watched_s >= plan.observe_s)
    num_answers = [each.num_answers for each in evidence.values()]
    if decision.step is RolloutStep.WATCH:
        decision = judge(plan, findings, max(num_answers, default=0), watched_s)
    texts = tuple(f"{each.outcome}: {each.text}" for each in findings)
    return Assessment(decision, outcomes, sum(num_answers), texts)


def _outcomes(
    db: Session, record: RolloutRecord, progress: RolloutProgress, clock: RolloutClock
) -> dict[str, ReasonedOutcome]:
    plan = progress.plan
    active = {each.device: each for each in candidates(db, plan.group, clock.now)}
    return {
        device: outcome_of(active[device], previous, record.bundle_id, plan, clock)
        for device, previous in progress.members.items()
        if device in active
    }


def evidence_by_mode(
    db: Session,
    record: RolloutRecord,
    *,
    plan: RolloutPlan,
    members: tuple[str, ...],
    since: float,
    now: float,
) -> dict[str, Evidence]:
    """Return the answers of a stage's devices from `since` on, and those to compare with.

    They are by mode, as far as the stage's devices have answered in it. A mode with too few answers
    has none to compare with.
    """
    new = _counts_of_devices(db, StatsQuery(now=now, since=since), members)
    evidence = _new_evidence(new, record.bundle_id)
    modes = [mode for mode, each in evidence.items() if each.num_answers >= plan.limits.min_answers]
    if not modes:
        return evidence
    baseline = StatsQuery(now=now, since=record.started_at - BASELINE_S, group=plan.group)
    own = _counts_of_devices(db, baseline, members)
    all_devices = counts_by_mode(db, baseline)
    for mode in modes:
        same = _counts_before(own, record.bundle_id, mode)
        others = _counts_before(all_devices, record.bundle_id, mode) - same
        evidence[mode] = evidence[mode]._replace(same=same, others=others)
    return evidence


def _new_evidence(
    counts: Mapping[tuple[str, str], Counter[str]], bundle_id: str
) -> dict[str, Evidence]:
    """Return the counts of a bundle by mode, without those to compare with."""
    modes = sorted(mode for other, mode in counts if other == bundle_id)
    return {mode: Evidence(counts[bundle_id, mode], Counter(), Counter()) for mode in modes}


def _counts_of_devices(
    db: Session, query: StatsQuery, devices: Sequence[str]
) -> defaultdict[tuple[str, str], Counter[str]]:
    """Return the counts of some devices by bundle and mode, by the columns of a roll-up.

    Devices are queried in chunks: a statement has a limited number of parameters.
    """
    counts: defaultdict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for i in range(0, len(devices), CHUNK_SIZE):
        chunk = msgspec.structs.replace(query, devices=tuple(devices[i : i + CHUNK_SIZE]))
        for key, columns in counts_by_mode(db, chunk).items():
            counts[key].update(columns)
    return counts


def _counts_before(
    counts: Mapping[tuple[str, str], Counter[str]], bundle_id: str, mode: str
) -> Counter[str]:
    """Return the sum of the counts of other bundles in a mode, or in one that is not known."""
    before = [
        each
        for (other, counted), each in counts.items()
        if other != bundle_id and counted in (mode, UNKNOWN_MODE)
    ]
    return sum(before, Counter())


def pending_steps(db: Session, now: float, receiving_since: float) -> list[PendingStep]:
    """Return the steps of the open roll-outs that are not paused."""
    steps = []
    for record in open_rollouts(db):
        if record.state == RolloutState.PAUSED:
            continue
        decision = assess(db, record, now, receiving_since).decision
        is_waiting = record.state == RolloutState.WAITING and decision.step is RolloutStep.MISS
        if decision.step is not RolloutStep.WAIT and not is_waiting:
            steps.append(PendingStep(record.id, record.state, record.stage, decision))
    return steps


def rollout_rows(
    db: Session, now: float, limit: int, *, before: int | None = None
) -> list[RolloutRow]:
    """Return the latest roll-outs, newest first; of the open ones also their assessments."""
    query = select(RolloutRecord).order_by(RolloutRecord.id.desc()).limit(limit)
    if before is not None:
        query = query.where(RolloutRecord.id < before)
    return [rollout_row(db, record, now) for record in db.scalars(query)]


def rollout_row(db: Session, record: RolloutRecord, now: float) -> RolloutRow:
    """Return a roll-out; of an open one also its assessment."""
    progress = progress_of(record)
    assessment = Assessment(RolloutDecision(RolloutStep.WAIT, ""))
    if record.state in OPEN:
        assessment = assess(db, record, now, 0.0)
    outcomes = [each.outcome for each in assessment.outcomes.values()]
    is_paused = record.state == RolloutState.PAUSED
    bundle = db.get(BundleRecord, record.bundle_id)
    return RolloutRow(
        id=record.id,
        bundle_id=record.bundle_id,
        bundle_name=bundle.name if bundle else None,
        group=progress.plan.group,
        state=record.state,
        stage=record.stage,
        num_stages=progress.plan.num_stages,
        num_targets=len(candidates(db, progress.plan.group, now)),
        num_told=len(progress.members),
        devices={outcome: outcomes.count(outcome) for outcome in DeviceOutcome},
        answers=assessment.num_answers,
        findings=assessment.findings,
        reason=record.reason,
        doing="" if is_paused else assessment.decision.reason,
        started_at=record.started_at,
        stage_at=record.stage_at,
        ended_at=record.ended_at,
        plan=msgspec.to_builtins(progress.plan),
    )
