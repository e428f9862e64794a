"""Transitions of alarms: the conditions that hold become states and events."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Final, NamedTuple, TypeAlias

from msgspec import Struct
from sqlalchemy import ColumnElement, delete, select
from sqlalchemy.orm import Session

from fleet.registry.alarms.alarm_kinds import AlarmChange, AlarmKind, AlarmState
from fleet.registry.models import AlarmEventRecord, AlarmRecord

CHUNK_SIZE: Final = 1000
AlarmKey: TypeAlias = tuple[AlarmKind, str]
"""A kind and a subject."""


class AlarmCondition(Struct, frozen=True, kw_only=True):
    """A condition that holds: of an alarm about `subject`, by the rule with these values."""

    kind: AlarmKind
    subject: str
    summary: str
    value: float | None = None
    threshold: float | None = None
    for_s: float = 0.0
    muted_until: float = 0.0

    @property
    def key(self) -> AlarmKey:
        """The key of its alarm."""
        return self.kind, self.subject


class AlarmEvaluation(NamedTuple):
    """The conditions that hold, and those of them that have held for their time (`due`).

    Alarms of the kinds `held` stay as they are: their conditions are not known now.
    """

    conditions: Mapping[AlarmKey, AlarmCondition]
    due: Collection[AlarmKey]
    held: Collection[AlarmKind] = ()


class AlarmTransitions(NamedTuple):
    """The changes that follow from an evaluation."""

    fire: list[AlarmCondition]
    resolve: list[AlarmRecord]
    update: list[tuple[AlarmRecord, AlarmCondition]]


def is_open() -> ColumnElement[bool]:
    """Condition: the alarm fires."""
    return AlarmRecord.state == AlarmState.FIRING


def plan_transitions(db: Session, evaluation: AlarmEvaluation, now: float) -> AlarmTransitions:
    """Return what an evaluation changes.

    An alarm that fires resolves when its condition holds no more. Until then it stays, also where
    another evaluation has not seen the condition for long enough: after a new start, for example.
    """
    records = {
        (AlarmKind(record.kind), record.subject): record
        for record in db.scalars(select(AlarmRecord).where(is_open()))
    }
    conditions = evaluation.conditions
    return AlarmTransitions(
        fire=[conditions[key] for key in evaluation.due if key not in records],
        resolve=[
            record
            for key, record in records.items()
            if key not in conditions and key[0] not in evaluation.held
        ],
        update=[
            (record, conditions[key])
            for key, record in records.items()
            if key in conditions and _differs(record, conditions[key], now)
        ],
    )


def _differs(record: AlarmRecord, condition: AlarmCondition, now: float) -> bool:
    muted_until = _muted_until(condition, now)
    if muted_until is None and not record.is_announced:
        return True
    return (record.summary, record.muted_until) != (condition.summary, muted_until)


def _muted_until(condition: AlarmCondition, now: float) -> float | None:
    return condition.muted_until if condition.muted_until > now else None


def apply_transitions(db: Session, changes: AlarmTransitions, actor: str, now: float) -> None:
    """Store changes and their events; `ALARM_LOCK` is held since they were planned."""
    for record in changes.resolve:
        record.state = AlarmState.RESOLVED
        record.resolved_at = now
        if record.is_announced:
            add_event(db, record, AlarmChange.RESOLVED, actor, now)
    for record, condition in changes.update:
        _update(record, condition, now)
        _announce(db, record, actor, now)
    _delete_resolved(db, (condition.key for condition in changes.fire))
    fired = [_new_record(condition, now) for condition in changes.fire]
    db.add_all(fired)
    db.flush()  # their ids
    for record in fired:
        _announce(db, record, actor, now)


def _delete_resolved(db: Session, keys: Iterable[AlarmKey]) -> None:
    """Delete the earlier alarms of these keys; their events stay."""
    subjects: dict[AlarmKind, list[str]] = {}
    for kind, subject in keys:
        subjects.setdefault(kind, []).append(subject)
    for kind, names in subjects.items():
        for i in range(0, len(names), CHUNK_SIZE):
            is_one = AlarmRecord.subject.in_(names[i : i + CHUNK_SIZE])
            db.execute(delete(AlarmRecord).where(AlarmRecord.kind == kind, is_one, ~is_open()))


def _new_record(condition: AlarmCondition, now: float) -> AlarmRecord:
    record = AlarmRecord(
        kind=condition.kind.value,
        subject=condition.subject,
        state=AlarmState.FIRING.value,
        fired_at=now,
        is_announced=False,
        note="",
    )
    _update(record, condition, now)
    return record


def _update(record: AlarmRecord, condition: AlarmCondition, now: float) -> None:
    record.summary = condition.summary
    record.value = condition.value
    record.threshold = condition.threshold
    record.muted_until = _muted_until(condition, now)


def _announce(db: Session, record: AlarmRecord, actor: str, now: float) -> None:
    """Add the event that an alarm fires, once, unless it is muted."""
    if not record.is_announced and record.muted_until is None:
        record.is_announced = True
        add_event(db, record, AlarmChange.FIRING, actor, now)


def add_event(db: Session, record: AlarmRecord, change: AlarmChange, by: str, now: float) -> None:
    """Add an event of an alarm, which has an id; `ALARM_LOCK` is held."""
    event = AlarmEventRecord(
        alarm=record.id,
        kind=record.kind,
        subject=record.subject,
        state=change.value,
        summary=record.summary,
        value=record.value,
        threshold=record.threshold,
        at=now,
        by=by[:200],
        note=record.note if change is AlarmChange.ACKNOWLEDGED else "",
    )
    db.add(event)
