"""Roll-outs in the registry: each step is decided from one look at it, and made in one transaction."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import msgspec
from sqlalchemy import select
from sqlalchemy.orm import Session

from fleet.errors import RolloutError
from fleet.protocol.desired_config import Settings
from fleet.registry.audit import audit
from fleet.registry.bundles import check_bundle
from fleet.registry.models import BundleRecord, IdentityRecord, RolloutRecord
from fleet.registry.rollouts.assessment import PendingStep, missing_worker
from fleet.registry.rollouts.plan import (
    PreviousState,
    RolloutDecision,
    RolloutPlan,
    RolloutProgress,
    RolloutStep,
    check_plan,
    controls_for,
    next_stage,
)
from fleet.registry.rollouts.repository import (
    candidates,
    course_of,
    enter,
    keep_course,
    open_rollouts,
    subject_of,
    watch,
)
from fleet.registry.rollouts.states import RolloutEvent, RolloutState, next_state
from fleet.registry.settings import Scope, change_scope, wider_settings

if TYPE_CHECKING:
    from fleet.registry.store import Registry

EVERY_S: Final = 2.0


class RolloutEngine:
    """Takes every open roll-out a step further; all that it knows is in the registry."""

    def __init__(
        self, registry: Registry, clock: Callable[[], float] = time.time, every_s: float = EVERY_S
    ) -> None:
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


def start_rollout(db: Session, actor: str, bundle_id: str, plan: RolloutPlan, now: float) -> int:
    """Makes a roll-out, which waits until the engine begins it; gives its id.

    Raises:
        RolloutError: the plan is not usable, the bundle is unknown, there is no such device, or another roll-out is
            open over some of them.
    """
    plan = check_plan(plan)
    db.execute(
        select(BundleRecord.bundle_id).order_by(BundleRecord.bundle_id).with_for_update()
    )  # one start at a time
    check_bundle(db, bundle_id)
    for other in open_rollouts(db):
        if None in (plan.group, group := course_of(other).plan.group) or group == plan.group:
            raise RolloutError(
                f"roll-out {other.id} of bundle {other.bundle_id} is {other.state} over the same devices; wait for its "
                f"end, or undo it with 'fleet bundle rollback {other.id}'"
            )
    found = candidates(db, plan.group, now)
    if not next_stage(RolloutProgress(plan), 0, found)[1] or (
        plan.canary_group and all(each.group != plan.canary_group for each in found)
    ):
        wanted = plan.canary_group or plan.group
        raise RolloutError(
            f"no active device {f'in the group {wanted!r}' if wanted else ''}; see 'fleet devices'"
        )
    record = RolloutRecord(
        bundle_id=bundle_id,
        state=RolloutState.WAITING,
        stage=0,
        plan=msgspec.to_builtins(RolloutProgress(plan)),
        reason=missing_worker(db, bundle_id),
        started_at=now,
        stage_at=now,
        ended_at=None,
    )
    db.add(record)
    db.flush()
    audit(
        db, actor, "rollout", subject_of(record), bundle=bundle_id, plan=msgspec.to_builtins(plan)
    )
    return record.id


def change_rollout(
    db: Session, actor: str, rollout: int | None, event: RolloutEvent, now: float
) -> int:
    """Pauses, resumes or undoes a roll-out, or the one that is open; gives its id.

    Raises:
        RolloutError: there is none, more than one, or the change is not legal in its state.
    """
    number = only_open_rollout(db) if rollout is None else rollout
    record = db.get(RolloutRecord, number, with_for_update=True, populate_existing=True)
    if record is None:
        raise RolloutError(f"unknown roll-out {rollout}; see 'fleet bundle status'")
    next_state(record.id, RolloutState(record.state), event)  # before anything is put back
    if event is RolloutEvent.UNDO:
        restore_previous(db, actor, record)
    enter(db, actor, record=record, event=event, reason="by hand", now=now)
    return record.id


def only_open_rollout(db: Session) -> int:
    """Raises RolloutError when none or more than one is open."""
    found = [record.id for record in open_rollouts(db)]
    if len(found) != 1:
        shown = ", ".join(map(str, found)) or "none"
        raise RolloutError(f"open roll-outs are {shown}; name one of them")
    return found[0]


# Steps of the engine.


def take_step(db: Session, due: PendingStep, now: float) -> None:
    """Does what was decided, unless somebody has changed the roll-out meanwhile."""
    record = db.get(RolloutRecord, due.rollout, with_for_update=True)
    if record is not None and (record.state, record.stage) == (due.state, due.stage):
        act(db, record, due.decision, now)


def act(db: Session, record: RolloutRecord, decided: RolloutDecision, now: float) -> None:
    actor = f"rollout {record.id}"
    match decided.step:
        case (
            RolloutStep.SERVE | RolloutStep.MISS
        ):  # its devices have their time again, and are watched anew
            record.stage_at = now
            watch(record, None)
            enter(
                db,
                actor,
                record=record,
                event=RolloutEvent(decided.step),
                reason=decided.reason,
                now=now,
            )
        case RolloutStep.WATCH:
            watch(record, now)
        case RolloutStep.ADVANCE:
            advance(db, actor, record, decided.reason, now)
        case RolloutStep.UNDO | RolloutStep.FAIL:
            restore_previous(db, actor, record)
            enter(
                db,
                actor,
                record=record,
                event=RolloutEvent(decided.step),
                reason=decided.reason,
                now=now,
            )


def advance(db: Session, actor: str, record: RolloutRecord, reason: str, now: float) -> None:
    """Tells the next stage's devices, or completes the roll-out when none is left."""
    course = course_of(record)
    found = candidates(db, course.plan.group, now)
    number, new = next_stage(course, record.stage, found)
    if not new:
        complete(db, actor, record, course)
        enter(db, actor, record=record, event=RolloutEvent.COMPLETE, reason=reason, now=now)
        return
    by_name = {each.device: each for each in found}
    sample = course.plan.agreement_sample or None
    controls = controls_for(course, found, new) if number < course.plan.num_stages else []
    members = dict(course.members)
    told = dict(course.controls)

    def tell(device: str, settings: Settings) -> Settings:
        seen = by_name[device]
        before = PreviousState(
            told_at=now,
            online=seen.online,
            bundle=settings.bundle,
            agreement_sample=settings.agreement_sample,
            error=seen.error,
            served=seen.bundle_id,
        )
        if device in told:  # as a control it had the sample's share before
            before = msgspec.structs.replace(
                before, agreement_sample=told.pop(device).agreement_sample
            )
        members[device] = before
        return msgspec.structs.replace(
            settings, bundle=record.bundle_id, agreement_sample=sample or settings.agreement_sample
        )

    def sample_only(device: str, settings: Settings) -> Settings:
        told[device] = PreviousState(
            told_at=now,
            online=True,
            bundle=settings.bundle,
            agreement_sample=settings.agreement_sample,
        )
        return msgspec.structs.replace(settings, agreement_sample=sample)

    change_scope(db, actor, Scope.DEVICE, new, tell)
    change_scope(db, actor, Scope.DEVICE, controls, sample_only)
    record.stage = number
    record.stage_at = now
    record.reason = reason[:200]
    keep_course(record, RolloutProgress(course.plan, members, told))
    audit(
        db,
        actor,
        "rollout_stage",
        subject_of(record),
        stage=number,
        devices=len(new),
        reason=reason,
    )


def complete(db: Session, actor: str, record: RolloutRecord, course: RolloutProgress) -> None:
    """The bundle is from now on what the widest scope of the roll-out says, and no narrower one."""
    group = course.plan.group
    serve = {"bundle": record.bundle_id}
    wide = (Scope.GROUP, group) if group else (Scope.ALL, "")
    change_scope(
        db,
        actor,
        wide[0],
        [wide[1]],
        lambda _, settings: msgspec.structs.replace(settings, **serve),
    )
    if not group:
        groups = {name for name in db.scalars(select(IdentityRecord.group).distinct()) if name}
        change_scope(
            db,
            actor,
            Scope.GROUP,
            groups,
            lambda _, settings: msgspec.structs.replace(settings, bundle=None),
        )
    restore(db, actor, record, course, lambda *_: None)


def restore_previous(db: Session, actor: str, record: RolloutRecord) -> None:
    """Gives every device that was told its earlier bundle and share of samples.

    A device that is told of no bundle stays with the one that it serves. So where nobody said which, it is told the one
    that it had.
    """
    course = course_of(record)
    wider = wider_settings(db, course.members)

    def earlier(device: str, before: PreviousState) -> str | None:
        return before.bundle or (None if wider[device].bundle else before.served or None)

    restore(db, actor, record, course, earlier)


def restore(
    db: Session,
    actor: str,
    record: RolloutRecord,
    course: RolloutProgress,
    bundle: Callable[[str, PreviousState], str | None],
) -> None:
    """What somebody has said meanwhile of another setting, or of another bundle, stays."""
    told = course.controls | course.members

    def change(device: str, settings: Settings) -> Settings:
        before = told[device]
        kept = settings.bundle if settings.bundle != record.bundle_id else bundle(device, before)
        share = settings.agreement_sample
        if share == (course.plan.agreement_sample or None):
            share = before.agreement_sample
        return msgspec.structs.replace(settings, bundle=kept, agreement_sample=share)

    change_scope(db, actor, Scope.DEVICE, list(told), change)
