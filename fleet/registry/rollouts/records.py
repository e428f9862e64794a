"""The rows of roll-outs: their progress, their changes of state, and their candidate devices."""

from __future__ import annotations

import msgspec
from sqlalchemy import select
from sqlalchemy.orm import Session

from fleet.registry.audit import audit
from fleet.registry.identities.devices import is_device
from fleet.registry.identities.lifecycle import IdentityState, state_at
from fleet.registry.models import IdentityRecord, RolloutRecord, StatusRecord
from fleet.registry.rollouts.plan import Candidate, RolloutProgress
from fleet.registry.rollouts.states import OPEN, RolloutEvent, RolloutState, next_rollout_state

MAX_REASON_LENGTH = 200
BY_HAND = "by hand"  # the reason of a change that an operator made


def open_rollouts(db: Session) -> list[RolloutRecord]:
    """Return the roll-outs that have not ended, oldest first."""
    query = select(RolloutRecord).where(RolloutRecord.state.in_(OPEN)).order_by(RolloutRecord.id)
    return list(db.scalars(query))


def progress_of(record: RolloutRecord) -> RolloutProgress:
    """Return the stored progress of a roll-out."""
    return msgspec.convert(record.plan, RolloutProgress)


def save_progress(record: RolloutRecord, progress: RolloutProgress) -> None:
    """Store the progress of a roll-out."""
    record.plan = msgspec.to_builtins(progress)


def subject_of(record: RolloutRecord) -> str:
    """Return the name of a roll-out in the audit log."""
    return f"rollout:{record.id}"


def watch(record: RolloutRecord, since: float | None) -> None:
    """Watch the stage's devices since then; None while some install the bundle."""
    save_progress(record, msgspec.structs.replace(progress_of(record), watched_from=since))


def transition(
    db: Session, actor: str, record: RolloutRecord, event: RolloutEvent, reason: str, now: float
) -> None:
    """Change a roll-out to the state that follows.

    Raises:
        RolloutError: the event is not legal in its state.
    """
    state = next_rollout_state(record.id, RolloutState(record.state), event)
    record.state = state
    record.reason = " ".join(reason.split())[:MAX_REASON_LENGTH]
    if state not in OPEN:
        record.ended_at = now
    details = {"state": state, "stage": record.stage, "reason": record.reason}
    audit(db, actor, "rollout", subject_of(record), **details)


def candidates(db: Session, group: str | None, now: float) -> list[Candidate]:
    """Return the active devices of a group, or all, with their newest statuses, by name."""
    query = (
        select(IdentityRecord, StatusRecord)
        .outerjoin(StatusRecord, StatusRecord.device == IdentityRecord.name)
        .where(is_device())
        .order_by(IdentityRecord.name)
    )
    if group is not None:
        query = query.where(IdentityRecord.group == group)
    return [
        _candidate(identity, status)
        for identity, status in db.execute(query)
        if state_at(identity.state, identity.not_after, now) is IdentityState.ACTIVE
    ]


def _candidate(identity: IdentityRecord, status: StatusRecord | None) -> Candidate:
    if status is None:
        return Candidate(device=identity.name, group=identity.group, online=False)
    return Candidate(
        device=identity.name,
        group=identity.group,
        online=status.online,
        bundle_id=status.bundle_id,
        last_seen=status.last_seen,
        problem=status.config_problem,
    )
