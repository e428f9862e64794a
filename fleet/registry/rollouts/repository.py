"""A roll-out's row: its course in it, its changes of state, and the devices that it may come to."""

from __future__ import annotations

import msgspec
from sqlalchemy import select
from sqlalchemy.orm import Session

from fleet.registry.audit import audit
from fleet.registry.identities.devices import is_device
from fleet.registry.identities.states import IdentityState, state_at
from fleet.registry.models import IdentityRecord, RolloutRecord, StatusRecord
from fleet.registry.rollouts.plan import Candidate, RolloutProgress
from fleet.registry.rollouts.states import OPEN, RolloutEvent, RolloutState, next_state


def open_rollouts(db: Session) -> list[RolloutRecord]:
    return list(
        db.scalars(
            select(RolloutRecord).where(RolloutRecord.state.in_(OPEN)).order_by(RolloutRecord.id)
        )
    )


def course_of(record: RolloutRecord) -> RolloutProgress:
    return msgspec.convert(record.plan, RolloutProgress)


def subject_of(record: RolloutRecord) -> str:
    """How the audit log names it."""
    return f"rollout:{record.id}"


def watch(record: RolloutRecord, since: float | None) -> None:
    keep_course(record, msgspec.structs.replace(course_of(record), watched_from=since))


def keep_course(record: RolloutRecord, course: RolloutProgress) -> None:
    record.plan = msgspec.to_builtins(course)


def enter(
    db: Session, actor: str, record: RolloutRecord, event: RolloutEvent, reason: str, now: float
) -> None:
    """The state that follows; raises RolloutError when the event is not legal."""
    state = next_state(record.id, RolloutState(record.state), event)
    record.state = state
    record.reason = " ".join(reason.split())[:200]
    if state not in OPEN:
        record.ended_at = now
    audit(
        db,
        actor,
        "rollout",
        subject_of(record),
        state=state,
        stage=record.stage,
        reason=record.reason,
    )


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
        Candidate(
            identity.name,
            identity.group,
            online=said.online,
            bundle_id=said.bundle_id,
            last_seen=said.last_seen,
            error=said.config_error,
        )
        if said
        else Candidate(identity.name, identity.group, online=False)
        for identity, said in db.execute(query)
        if state_at(identity.state, identity.not_after, now) is IdentityState.ACTIVE
    ]
