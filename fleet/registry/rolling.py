"""Roll-outs in the registry: each step is decided from one look at it, and made in one transaction."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec
from sqlalchemy import select
from sqlalchemy.orm import Session

from fleet.desired import Settings
from fleet.errors import RolloutError
from fleet.registry.audit import audit
from fleet.registry.bundles import check_bundle, serving_workers
from fleet.registry.configs import Scope, change_scope
from fleet.registry.counting import By, Question, count
from fleet.registry.devices import is_device
from fleet.registry.evidence import Evidence, examine
from fleet.registry.models import IdentityRecord, RolloutRecord, StatusRecord
from fleet.registry.rollout_states import OPEN, RolloutEvent, RolloutState, next_state
from fleet.registry.rollouts import (
    Before,
    Candidate,
    Course,
    Decision,
    Fate,
    Moment,
    Plan,
    Step,
    check_plan,
    controls_for,
    decide,
    fate_of,
    judge,
    next_stage,
)
from fleet.registry.rows import RolloutRow
from fleet.registry.states import State, state_at
from fleet.registry.tally import Tally

if TYPE_CHECKING:
    from fleet.registry.store import Registry

EVERY_S: Final = 2.0
BASELINE_S: Final = 86_400.0
"""How far back answers of the earlier bundles are compared with."""


class Look(NamedTuple):
    """What was seen of a roll-out at one moment, and what follows from it."""

    fates: dict[str, tuple[Fate, str]]
    num_answers: int
    findings: tuple[str, ...]
    decision: Decision


class Due(NamedTuple):
    """A decision, and the state and stage that it was taken in."""

    rollout: int
    state: str
    stage: int
    decision: Decision


class RolloutEngine:
    """Takes every open roll-out a step further; all that it knows is in the registry."""

    def __init__(self, registry: Registry, clock: Callable[[], float] = time.time, every_s: float = EVERY_S) -> None:
        self._registry = registry
        self._clock = clock
        self._every_s = every_s
        self._heard_since = clock()
        self._next = self._heard_since

    def step(self) -> None:
        """Does nothing when the last step was less than `every_s` seconds ago; raises RegistryError."""
        now = self._clock()
        if now >= self._next:
            self._next = now + self._every_s
            self._registry.step_rollouts(now, self._heard_since)


# Changes by hand.


def start_rollout(db: Session, actor: str, bundle_id: str, plan: Plan, now: float) -> int:
    """Makes a roll-out, which waits until the engine begins it; gives its id.

    Raises:
        RolloutError: the plan is not usable, the bundle is unknown, there is no such device, or another roll-out is
            open over some of them.
    """
    plan = check_plan(plan)
    check_bundle(db, bundle_id)
    for other in open_rollouts(db):
        if None in (plan.group, group := course_of(other).plan.group) or group == plan.group:
            raise RolloutError(
                f"roll-out {other.id} of bundle {other.bundle_id} is {other.state} over the same devices; wait for its "
                f"end, or undo it with 'fleet bundle rollback {other.id}'"
            )
    found = candidates(db, plan.group, now)
    if not next_stage(Course(plan), 0, found)[1] or (
        plan.canary_group and all(each.group != plan.canary_group for each in found)
    ):
        wanted = plan.canary_group or plan.group
        raise RolloutError(f"no active device {f'in the group {wanted!r}' if wanted else ''}; see 'fleet devices'")
    record = RolloutRecord(
        bundle_id=bundle_id, state=RolloutState.WAITING, stage=0, plan=msgspec.to_builtins(Course(plan)),
        reason=missing_worker(db, bundle_id), started_at=now, stage_at=now, ended_at=None,
    )  # fmt: skip
    db.add(record)
    db.flush()
    audit(db, actor, "rollout", str(record.id), bundle=bundle_id, plan=msgspec.to_builtins(plan))
    return record.id


def change_rollout(db: Session, actor: str, rollout: int | None, event: RolloutEvent, now: float) -> int:
    """Pauses, resumes or undoes a roll-out, or the one that is open; gives its id.

    Raises:
        RolloutError: there is none, more than one, or the change is not legal in its state.
    """
    record = db.get(RolloutRecord, rollout, with_for_update=True) if rollout is not None else the_open_one(db)
    if record is None:
        raise RolloutError(f"unknown roll-out {rollout}; see 'fleet bundle status'")
    next_state(record.id, RolloutState(record.state), event)  # before anything is put back
    if event is RolloutEvent.UNDO:
        put_back(db, actor, record)
    elif event is RolloutEvent.RESUME:  # its devices have as much time as they had at first
        record.stage_at = now
        watch(record, None)
    enter(db, actor, record, event, "by hand", now)
    return record.id


def the_open_one(db: Session) -> RolloutRecord:
    found = open_rollouts(db)
    if len(found) != 1:
        shown = ", ".join(str(each.id) for each in found) or "none"
        raise RolloutError(f"open roll-outs are {shown}; name one of them")
    return found[0]


# Steps of the engine.


def open_rollouts(db: Session) -> list[RolloutRecord]:
    return list(db.scalars(select(RolloutRecord).where(RolloutRecord.state.in_(OPEN)).order_by(RolloutRecord.id)))


def look(db: Session, record: RolloutRecord, now: float, heard_since: float) -> Look:
    """What is seen of a roll-out, and what a running one needs."""
    course = course_of(record)
    seen = {each.device: each for each in candidates(db, course.plan.group, now)}
    at = Moment(now, record.stage_at, heard_since)
    fates = {
        device: fate_of(seen[device], before, record.bundle_id, course.plan, at)
        for device, before in course.members.items()
        if device in seen
    }
    if missing := missing_worker(db, record.bundle_id):
        return Look(fates, 0, (), Decision(Step.MISS, missing))
    if record.state == RolloutState.WAITING:
        return Look(fates, 0, (), Decision(Step.SERVE, "a worker serves it"))
    if not record.stage:
        return Look(fates, 0, (), Decision(Step.ADVANCE, "a worker serves it"))
    decision = decide(course, fates, at)
    if course.watched_from is None:
        return Look(fates, 0, (), decision)
    evidence = evidence_of(db, record, course, tuple(fates), now)
    watched_s = now - course.watched_from
    is_final = watched_s >= course.plan.observe_s
    findings = examine(evidence, course.plan.limits, is_final=is_final)
    if decision.step is Step.WATCH:
        decision = judge(course.plan, findings, evidence.num_answers, watched_s)
    texts = tuple(f"{each.outcome}: {each.text}" for each in findings)
    return Look(fates, evidence.num_answers, texts, decision)


def missing_worker(db: Session, bundle_id: str) -> str:
    """What a roll-out waits for; "" when a worker serves the bundle."""
    if bundle_id in serving_workers(db):
        return ""
    return f"no worker serves bundle {bundle_id}: 'fleet up' starts one; elsewhere start one with --bundle"


def evidence_of(db: Session, record: RolloutRecord, course: Course, members: tuple[str, ...], now: float) -> Evidence:
    """Answers of the stage's devices since it began, and what to compare with: from a day before the roll-out on."""
    before = record.started_at - BASELINE_S
    new = count(db, By.BUNDLE, Question(now, record.stage_at, devices=members))[record.bundle_id]
    same = count(db, By.BUNDLE, Question(now, before, group=course.plan.group, devices=members))
    others = count(db, By.BUNDLE, Question(now, before, group=course.plan.group, without=members))
    return Evidence(new, _without(same, record.bundle_id), _without(others, record.bundle_id))


def due_steps(db: Session, now: float, heard_since: float) -> list[Due]:
    """What open roll-outs need that are not paused; nothing is changed by looking."""
    due = []
    for record in open_rollouts(db):
        if record.state != RolloutState.PAUSED:
            decision = look(db, record, now, heard_since).decision
            is_known = decision.step is Step.MISS and record.state == RolloutState.WAITING
            if decision.step is not Step.WAIT and not is_known:
                due.append(Due(record.id, record.state, record.stage, decision))
    return due


def take_step(db: Session, due: Due, now: float) -> None:
    """Does what was decided, unless somebody has changed the roll-out meanwhile."""
    record = db.get(RolloutRecord, due.rollout, with_for_update=True)
    if record is not None and (record.state, record.stage) == (due.state, due.stage):
        act(db, record, due.decision, now)


def act(db: Session, record: RolloutRecord, decided: Decision, now: float) -> None:
    actor = f"rollout {record.id}"
    match decided.step:
        case Step.SERVE | Step.MISS:  # whatever was watched until now is watched anew
            watch(record, None)
            enter(db, actor, record, RolloutEvent(decided.step), decided.reason, now)
        case Step.WATCH:
            watch(record, now)
        case Step.ADVANCE:
            advance(db, actor, record, decided.reason, now)
        case Step.UNDO | Step.FAIL:
            put_back(db, actor, record)
            enter(db, actor, record, RolloutEvent(decided.step), decided.reason, now)


def advance(db: Session, actor: str, record: RolloutRecord, reason: str, now: float) -> None:
    """Tells the next stage's devices, or completes the roll-out when none is left."""
    course = course_of(record)
    found = candidates(db, course.plan.group, now)
    number, new = next_stage(course, record.stage, found)
    if not new:
        complete(db, actor, record, course)
        enter(db, actor, record, RolloutEvent.COMPLETE, reason, now)
        return
    by_name = {each.device: each for each in found}
    sample = course.plan.agreement_sample or None
    controls = controls_for(course, found, new) if number < course.plan.num_stages else []
    members, told = dict(course.members), dict(course.controls)

    def tell(device: str, settings: Settings) -> Settings:
        seen = by_name[device]
        before = Before(now, seen.online, settings.bundle, settings.agreement_sample, seen.error)
        if device in told:  # as a control it had the sample's share before
            before = msgspec.structs.replace(before, agreement_sample=told.pop(device).agreement_sample)
        members[device] = before
        return msgspec.structs.replace(
            settings, bundle=record.bundle_id, agreement_sample=sample or settings.agreement_sample
        )

    def sample_only(device: str, settings: Settings) -> Settings:
        told[device] = Before(now, True, settings.bundle, settings.agreement_sample)
        return msgspec.structs.replace(settings, agreement_sample=sample)

    change_scope(db, actor, Scope.DEVICE, new, tell)
    change_scope(db, actor, Scope.DEVICE, controls, sample_only)
    record.stage, record.stage_at, record.reason = number, now, reason[:200]
    keep_course(record, Course(course.plan, members, told))
    audit(db, actor, "rollout_stage", str(record.id), stage=number, devices=len(new), reason=reason)


def complete(db: Session, actor: str, record: RolloutRecord, course: Course) -> None:
    """The bundle is from now on what the widest scope of the roll-out says, and no narrower one."""
    group = course.plan.group
    serve = {"bundle": record.bundle_id}
    wide = (Scope.GROUP, group) if group else (Scope.ALL, "")
    change_scope(db, actor, wide[0], [wide[1]], lambda _, settings: msgspec.structs.replace(settings, **serve))
    if not group:
        groups = {name for name in db.scalars(select(IdentityRecord.group).distinct()) if name}
        change_scope(db, actor, Scope.GROUP, groups, lambda _, settings: msgspec.structs.replace(settings, bundle=None))
    restore(db, actor, record, course, lambda _: None)


def put_back(db: Session, actor: str, record: RolloutRecord) -> None:
    """Gives every device that was told its earlier bundle and share of samples."""
    restore(db, actor, record, course_of(record), lambda before: before.bundle)


def restore(
    db: Session, actor: str, record: RolloutRecord, course: Course, bundle: Callable[[Before], str | None]
) -> None:
    """What somebody has said meanwhile of another setting, or of another bundle, stays."""
    told = course.controls | course.members

    def change(device: str, settings: Settings) -> Settings:
        before = told[device]
        kept = settings.bundle if settings.bundle != record.bundle_id else bundle(before)
        share = settings.agreement_sample
        if share == (course.plan.agreement_sample or None):
            share = before.agreement_sample
        return msgspec.structs.replace(settings, bundle=kept, agreement_sample=share)

    change_scope(db, actor, Scope.DEVICE, list(told), change)


def enter(db: Session, actor: str, record: RolloutRecord, event: RolloutEvent, reason: str, now: float) -> None:
    """The state that follows; raises RolloutError when the event is not legal."""
    state = next_state(record.id, RolloutState(record.state), event)
    record.state, record.reason = state, " ".join(reason.split())[:200]
    if state not in OPEN:
        record.ended_at = now
    audit(db, actor, "rollout", str(record.id), state=state, stage=record.stage, reason=record.reason)


# What is there.


def candidates(db: Session, group: str | None, now: float) -> list[Candidate]:
    """The active devices of a group or all, with what each said last, by name."""
    query = (
        select(IdentityRecord, StatusRecord)
        .outerjoin(StatusRecord, StatusRecord.device == IdentityRecord.name)
        .where(is_device())
        .order_by(IdentityRecord.name)
    )
    if group is not None:
        query = query.where(IdentityRecord.group == group)
    return [
        Candidate(identity.name, identity.group, said.online, said.bundle_id, said.last_seen, said.config_error)
        if said
        else Candidate(identity.name, identity.group, online=False)
        for identity, said in db.execute(query)
        if state_at(identity.state, identity.not_after, now) is State.ACTIVE
    ]


def rollout_rows(db: Session, now: float, limit: int) -> list[RolloutRow]:
    """The latest roll-outs, newest first; of those that are open also how far they are."""
    rows = []
    for record in db.scalars(select(RolloutRecord).order_by(RolloutRecord.id.desc()).limit(limit)):
        course = course_of(record)
        seen = look(db, record, now, 0.0) if record.state in OPEN else Look({}, 0, (), Decision(Step.WAIT, ""))
        fates = [fate for fate, _ in seen.fates.values()]
        rows.append(
            RolloutRow(
                id=record.id, bundle_id=record.bundle_id, group=course.plan.group, state=record.state,
                stage=record.stage, num_stages=course.plan.num_stages,
                num_targets=len(candidates(db, course.plan.group, now)), num_told=len(course.members),
                devices={fate: fates.count(fate) for fate in Fate}, answers=seen.num_answers,
                findings=seen.findings, reason=record.reason,
                doing=seen.decision.reason if record.state != RolloutState.PAUSED else "",
                started_at=record.started_at, stage_at=record.stage_at, ended_at=record.ended_at,
                plan=msgspec.to_builtins(course.plan),
            )
        )  # fmt: skip
    return rows


def course_of(record: RolloutRecord) -> Course:
    return msgspec.convert(record.plan, Course)


def watch(record: RolloutRecord, since: float | None) -> None:
    keep_course(record, msgspec.structs.replace(course_of(record), watched_from=since))


def keep_course(record: RolloutRecord, course: Course) -> None:
    record.plan = msgspec.to_builtins(course)


def _without(tallies: dict[str, Tally], bundle_id: str) -> Tally:
    """The sums over all other bundles."""
    total = Tally()
    for other, tally in tallies.items():
        if other != bundle_id:
            total.counts.update(tally.counts)
    return total
