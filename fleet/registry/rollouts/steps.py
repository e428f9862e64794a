"""The steps of roll-outs: each is decided from one assessment, and applied in one transaction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import msgspec
from sqlalchemy import select
from sqlalchemy.orm import Session

from fleet.protocol.desired_config import Settings
from fleet.registry.audit import audit
from fleet.registry.models import IdentityRecord, RolloutRecord
from fleet.registry.rollouts.assessment import PendingStep
from fleet.registry.rollouts.plan import (
    Candidate,
    PreviousState,
    RolloutDecision,
    RolloutProgress,
    RolloutStep,
    controls_for,
    next_stage,
)
from fleet.registry.rollouts.records import (
    MAX_REASON_LENGTH,
    candidates,
    progress_of,
    save_progress,
    subject_of,
    transition,
    watch,
)
from fleet.registry.rollouts.states import RolloutEvent
from fleet.registry.settings import change_scope, wider_settings
from fleet.registry.targets import Scope

replace = msgspec.structs.replace

ChooseBundle: TypeAlias = Callable[[str, PreviousState], str | None]
"""Chooses the bundle of a device's own settings after the roll-out."""


def apply_step(db: Session, step: PendingStep, now: float) -> None:
    """Apply a step, unless the roll-out has changed since it was decided."""
    record = db.get(RolloutRecord, step.rollout, with_for_update=True)
    if record is not None and (record.state, record.stage) == (step.state, step.stage):
        apply(db, record, step.decision, now)


def apply(db: Session, record: RolloutRecord, decision: RolloutDecision, now: float) -> None:
    """Apply a decision to a roll-out."""
    actor = f"rollout {record.id}"
    match decision.step:
        case RolloutStep.WATCH:
            watch(record, now)
            return
        case RolloutStep.WAIT:
            return
        case RolloutStep.ADVANCE:
            advance_stage(db, actor, record, decision.reason, now)
            return
        case RolloutStep.SERVE | RolloutStep.MISS:
            # Its devices have their full time again, and are watched anew.
            record.stage_at = now
            watch(record, None)
        case RolloutStep.UNDO | RolloutStep.FAIL:
            restore_previous(db, actor, record)
    event = RolloutEvent(decision.step)
    transition(db, actor, record=record, event=event, reason=decision.reason, now=now)


def advance_stage(db: Session, actor: str, record: RolloutRecord, reason: str, now: float) -> None:
    """Change the settings of the next stage's devices; complete the roll-out after the last."""
    progress = progress_of(record)
    active = candidates(db, progress.plan.group, now)
    number, devices = next_stage(progress, record.stage, active)
    if not devices:
        complete(db, actor, record, progress)
        event = RolloutEvent.COMPLETE
        transition(db, actor, record=record, event=event, reason=reason, now=now)
        return
    is_last = number == progress.plan.num_stages
    controls = [] if is_last else controls_for(progress, active, devices)
    stage = _Stage(
        bundle_id=record.bundle_id,
        now=now,
        sample=progress.plan.agreement_sample or None,
        candidates={each.device: each for each in active},
        members=dict(progress.members),
        controls=dict(progress.controls),
    )
    change_scope(db, actor, Scope.DEVICE, devices, stage.add_member)
    change_scope(db, actor, Scope.DEVICE, controls, stage.add_control)
    save_progress(record, RolloutProgress(progress.plan, stage.members, stage.controls))
    record.stage = number
    record.stage_at = now
    record.reason = reason[:MAX_REASON_LENGTH]
    details = {"stage": number, "devices": len(devices), "reason": reason}
    audit(db, actor, "rollout_stage", subject_of(record), **details)


@dataclass(frozen=True, kw_only=True)
class _Stage:
    """A stage that begins at `now`; it adds to `members` and `controls`."""

    bundle_id: str
    now: float
    sample: float | None
    candidates: dict[str, Candidate]
    members: dict[str, PreviousState]
    controls: dict[str, PreviousState]

    def add_member(self, device: str, settings: Settings) -> Settings:
        """Return a device's settings with the bundle and the sample."""
        candidate = self.candidates[device]
        # A device that was a control had another sample before.
        control = self.controls.pop(device, None)
        sample = control.agreement_sample if control else settings.agreement_sample
        self.members[device] = PreviousState(
            told_at=self.now,
            online=candidate.online,
            bundle=settings.bundle,
            agreement_sample=sample,
            error=candidate.problem.message if candidate.problem else "",
            served=candidate.bundle_id,
        )
        return replace(
            settings,
            bundle=self.bundle_id,
            agreement_sample=self.sample or settings.agreement_sample,
        )

    def add_control(self, device: str, settings: Settings) -> Settings:
        """Return a device's settings with the sample."""
        self.controls[device] = PreviousState(
            told_at=self.now,
            online=True,
            bundle=settings.bundle,
            agreement_sample=settings.agreement_sample,
        )
        return replace(settings, agreement_sample=self.sample)


def complete(db: Session, actor: str, record: RolloutRecord, progress: RolloutProgress) -> None:
    """Set the bundle in the widest scope of the roll-out, and clear it in the narrower ones."""

    def use_bundle(_: str, settings: Settings) -> Settings:
        return replace(settings, bundle=record.bundle_id)

    def clear_bundle(_: str, settings: Settings) -> Settings:
        return replace(settings, bundle=None)

    group = progress.plan.group
    if group:
        change_scope(db, actor, Scope.GROUP, [group], use_bundle)
    else:
        change_scope(db, actor, Scope.ALL, [""], use_bundle)
        groups = {name for name in db.scalars(select(IdentityRecord.group).distinct()) if name}
        change_scope(db, actor, Scope.GROUP, groups, clear_bundle)
    restore(db, actor, record, progress, lambda *_: None)


def restore_previous(db: Session, actor: str, record: RolloutRecord) -> None:
    """Restore the previous bundle and sample of every device that the roll-out changed.

    A device without a bundle in its settings keeps the one that it serves. So where no scope names
    one, its own settings name the bundle that it served before.
    """
    progress = progress_of(record)
    wider = wider_settings(db, progress.members)

    def previous_bundle(device: str, previous: PreviousState) -> str | None:
        if previous.bundle or wider[device].bundle:
            return previous.bundle
        return previous.served or None

    restore(db, actor, record, progress, previous_bundle)


def restore(
    db: Session,
    actor: str,
    record: RolloutRecord,
    progress: RolloutProgress,
    choose_bundle: ChooseBundle,
) -> None:
    """Restore the settings that the roll-out changed, except those that were changed since."""
    changed = progress.controls | progress.members
    sample = progress.plan.agreement_sample or None

    def restored(device: str, settings: Settings) -> Settings:
        previous = changed[device]
        if settings.bundle == record.bundle_id:
            settings = replace(settings, bundle=choose_bundle(device, previous))
        if settings.agreement_sample == sample:
            settings = replace(settings, agreement_sample=previous.agreement_sample)
        return settings

    change_scope(db, actor, Scope.DEVICE, list(changed), restored)
