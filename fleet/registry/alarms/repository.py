"""The repository of alarms: rules, states, events and the cursors of deliveries."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

from msgspec.structs import asdict
from sqlalchemy import ColumnElement, and_, delete, func, select
from sqlalchemy.orm import Session

from fleet.errors import ConfigError
from fleet.registry.alarms.alarm_kinds import AlarmChange, AlarmKind, AlarmState
from fleet.registry.alarms.alarm_rows import AlarmEvent, AlarmFilter, AlarmRow, AlarmTotals
from fleet.registry.alarms.conditions import FactsOf, find_conditions
from fleet.registry.alarms.observations import observe_fleet
from fleet.registry.alarms.rules import (
    MAX_MUTE_S,
    AlarmRule,
    AlarmRuleBook,
    AlarmRuleValues,
    RuleKey,
    check_rule,
    check_scope,
)
from fleet.registry.alarms.transitions import (
    AlarmCondition,
    AlarmEvaluation,
    AlarmKey,
    add_event,
    apply_transitions,
    is_open,
    plan_transitions,
)
from fleet.registry.audit import audit
from fleet.registry.database import ALARM_LOCK, acquire_lock
from fleet.registry.models import (
    AlarmCursorRecord,
    AlarmEventRecord,
    AlarmRecord,
    AlarmRuleRecord,
    IdentityRecord,
)
from fleet.registry.settings import check_settings_target
from fleet.registry.targets import Scope, Target
from fleet.registry.transactions import Repository
from fleet.utils.printable import printable

MAX_NOTE_LENGTH: Final = 1000
VALUE_NAMES: Final = AlarmRuleValues.__struct_fields__


class AlarmRepository(Repository):
    """The alarms of the fleet. Each method is one transaction."""

    def page(
        self, wanted: AlarmFilter, limit: int = 100, *, before: int | None = None
    ) -> list[AlarmRow]:
        """Return alarms, the newest first; only those whose ids are below `before`."""
        query = select(AlarmRecord).where(*_conditions(wanted)).order_by(AlarmRecord.id.desc())
        if before is not None:
            query = query.where(AlarmRecord.id < before)
        with self._transactions.reading() as db:
            return [alarm_row(record) for record in db.scalars(query.limit(limit))]

    def open_alarms(self) -> list[AlarmRow]:
        """Return all alarms that fire, the newest first."""
        query = select(AlarmRecord).where(is_open()).order_by(AlarmRecord.id.desc())
        with self._transactions.reading() as db:
            return [alarm_row(record) for record in db.scalars(query)]

    def totals(self) -> AlarmTotals:
        """Return the numbers of the alarms that fire."""
        query = (
            select(AlarmRecord.kind, func.count(), func.count(AlarmRecord.acknowledged_by))
            .where(is_open())
            .group_by(AlarmRecord.kind)
        )
        with self._transactions.reading() as db:
            rows = db.execute(query).all()
        return AlarmTotals(
            open=sum(number for _, number, _ in rows),
            acknowledged=sum(acknowledged for *_, acknowledged in rows),
            by_kind={kind: number for kind, number, _ in sorted(rows)},
        )

    def conditions(self, facts_of: FactsOf, now: float) -> dict[AlarmKey, AlarmCondition]:
        """Return the conditions of enabled rules that hold at `now`.

        `facts_of` returns what the manifest of a bundle says.
        """
        with self._transactions.reading() as db:
            rules = rule_book(db)
            fleet = observe_fleet(db, now, rules.greatest_threshold(AlarmKind.CERTIFICATE))
            return {each.key: each for each in find_conditions(fleet, rules, facts_of, now)}

    def apply(self, evaluation: AlarmEvaluation, now: float | None = None) -> None:
        """Store what an evaluation changes, with its events, if it changes something.

        Of two processes that evaluate at once, the second finds what the first has stored.
        """
        at = now or time.time()
        with self._transactions.reading() as db:
            if not any(plan_transitions(db, evaluation, at)):
                return

        def work(db: Session) -> None:
            acquire_lock(db, ALARM_LOCK)
            apply_transitions(db, plan_transitions(db, evaluation, at), self.actor, at)

        self._transactions.write(work)

    def acknowledge(self, alarms: Sequence[int], note: str = "") -> list[AlarmRow]:
        """Acknowledge alarms under the actor's name; return them. A note becomes one line.

        Raises:
            ConfigError: there is no such alarm, it has resolved, or it was acknowledged; then none
                of them is acknowledged.
        """
        if not alarms:
            raise ConfigError("nothing to acknowledge: give the ids of alarms")
        now = time.time()

        def work(db: Session) -> list[AlarmRow]:
            acquire_lock(db, ALARM_LOCK)
            return [self._acknowledge(db, each, note, now) for each in dict.fromkeys(alarms)]

        return self._transactions.write(work)

    def _acknowledge(self, db: Session, alarm: int, note: str, now: float) -> AlarmRow:
        record = _acknowledgeable(db, alarm)
        record.acknowledged_by = self.actor[:200]
        record.acknowledged_at = now
        record.note = printable(" ".join(note.split()))[:MAX_NOTE_LENGTH]
        add_event(db, record, AlarmChange.ACKNOWLEDGED, self.actor, now)
        details = {"alarm": alarm, "kind": record.kind, "note": record.note}
        audit(db, self.actor, "alarm_acknowledge", record.subject, **details)
        return alarm_row(record)

    def events(
        self,
        kind: AlarmKind | None = None,
        subject: str | None = None,
        limit: int = 100,
        *,
        before: int | None = None,
    ) -> list[AlarmEvent]:
        """Return events, the newest first; only those whose ids are below `before`."""
        event = AlarmEventRecord
        query = select(event).order_by(event.id.desc()).limit(limit)
        if kind is not None:
            query = query.where(event.kind == kind)
        if subject is not None:
            query = query.where(event.subject == subject)
        if before is not None:
            query = query.where(event.id < before)
        with self._transactions.reading() as db:
            return [_event(record) for record in db.scalars(query)]

    def events_after(self, event_id: int, limit: int = 100) -> list[AlarmEvent]:
        """Return the events that follow one, the oldest first, for their delivery."""
        event = AlarmEventRecord
        query = select(event).where(event.id > event_id).order_by(event.id).limit(limit)
        with self._transactions.reading() as db:
            return [_event(record) for record in db.scalars(query)]

    def newest_event(self) -> int:
        """Return the id of the newest event; 0 before the first."""
        with self._transactions.reading() as db:
            return db.scalar(select(func.max(AlarmEventRecord.id))) or 0

    def delivered(self, target: str) -> int | None:
        """Return the id of the newest event that was delivered to a target; None for a new one."""
        cursor = AlarmCursorRecord
        with self._transactions.reading() as db:
            return db.scalar(select(cursor.event_id).where(cursor.target == target))

    def set_delivered(self, target: str, event_id: int) -> None:
        """Record that the events up to one were delivered to a target; it never goes back."""

        def work(db: Session) -> None:
            record = db.get(AlarmCursorRecord, target, with_for_update=True)
            if record is None:
                db.add(AlarmCursorRecord(target=target, event_id=event_id))
            else:
                record.event_id = max(record.event_id, event_id)

        self._transactions.write(work)

    def delete_old(self, before: float, limit: int) -> int:
        """Delete at most `limit` events from before then, and the alarms that resolved before.

        Return the number of deleted events.
        """

        def work(db: Session) -> int:
            event = AlarmEventRecord
            oldest = select(event.id).where(event.at < before).order_by(event.at).limit(limit)
            ids = db.scalars(oldest).all()
            db.execute(delete(event).where(event.id.in_(ids)))
            is_old = AlarmRecord.resolved_at < before
            db.execute(delete(AlarmRecord).where(AlarmRecord.state == AlarmState.RESOLVED, is_old))
            return len(ids)

        return self._transactions.write(work)

    def rules(self) -> AlarmRuleBook:
        """Return all rules."""
        with self._transactions.reading() as db:
            return rule_book(db)

    def merged_rules(self, target: Target) -> dict[AlarmKind, AlarmRule]:
        """Return the rules of a target, merged with those of wider scopes.

        Raises:
            UnknownDeviceError: the device is not enrolled.
            ConfigError: no device is in the group.
        """
        with self._transactions.reading() as db:
            check_settings_target(db, target)
            book = rule_book(db)
            device = target.name if target.scope is Scope.DEVICE else None
            group = target.name if target.scope is Scope.GROUP else None
            if device is not None:
                group = db.get_one(IdentityRecord, device).group
            return {kind: book.rule(kind, device, group) for kind in AlarmKind}

    def set_rule(self, kind: AlarmKind, target: Target, values: AlarmRuleValues) -> None:
        """Set the values that are not None, for one kind and target.

        Raises:
            UnknownDeviceError: the device is not enrolled.
            ConfigError: no device is in the group, a value is out of its range, or the kind has no
                rules for such a target.
        """
        check_rule(kind, values)
        self._transactions.write(lambda db: self._set_rule(db, kind, target, values))

    def mute(self, kinds: Sequence[AlarmKind], target: Target, for_s: float) -> float:
        """Mute kinds of alarms of a target for some seconds, with 0 no longer; return the end.

        Raises:
            UnknownDeviceError: the device is not enrolled.
            ConfigError: no device is in the group, the time is out of its range, or a kind has no
                rules for such a target.
        """
        if not 0 <= for_s <= MAX_MUTE_S:
            raise ConfigError(f"mute for {for_s:g} s: expected 0 to {MAX_MUTE_S:g} seconds")
        until = time.time() + for_s if for_s else 0.0

        def work(db: Session) -> None:
            for kind in kinds:
                self._set_rule(db, kind, target, AlarmRuleValues(muted_until=until))

        self._transactions.write(work)
        return until

    def _set_rule(
        self, db: Session, kind: AlarmKind, target: Target, values: AlarmRuleValues
    ) -> None:
        check_scope(kind, target)
        check_settings_target(db, target)
        acquire_lock(db, ALARM_LOCK)
        key = {"kind": kind.value, "scope": target.scope.value, "target": target.name}
        record = db.get(AlarmRuleRecord, tuple(key.values())) or AlarmRuleRecord(**key)
        given = {name: value for name, value in asdict(values).items() if value is not None}
        for name, value in given.items():
            setattr(record, name, value)
        db.add(record)
        audit(db, self.actor, "alarm_rule", str(target), kind=kind.value, **given)

    def delete_rule(self, kind: AlarmKind, target: Target) -> None:
        """Delete what a target sets for a kind, so that a wider scope decides again.

        Raises:
            ConfigError: it sets nothing.
        """

        def work(db: Session) -> None:
            acquire_lock(db, ALARM_LOCK)
            record = db.get(AlarmRuleRecord, (kind.value, target.scope.value, target.name))
            if record is None:
                raise ConfigError(
                    f"{target} has no rule of its own for {kind}; see 'fleet alarms rules'"
                )
            db.delete(record)
            audit(db, self.actor, "alarm_rule_unset", str(target), kind=kind.value)

        self._transactions.write(work)


def _conditions(wanted: AlarmFilter) -> list[ColumnElement[bool]]:
    is_acknowledged = AlarmRecord.acknowledged_by.is_not(None)
    by_state: dict[str, list[ColumnElement[bool]]] = {
        "open": [is_open()],
        "firing": [and_(is_open(), ~is_acknowledged)],
        "acknowledged": [and_(is_open(), is_acknowledged)],
        "resolved": [~is_open()],
        "all": [],
    }
    conditions = by_state[wanted.state]
    if wanted.kind is not None:
        conditions = [*conditions, AlarmRecord.kind == wanted.kind]
    if wanted.subject is not None:
        conditions = [*conditions, AlarmRecord.subject == wanted.subject]
    return conditions


def _acknowledgeable(db: Session, alarm: int) -> AlarmRecord:
    """Return an alarm that fires and is not acknowledged. Raises ConfigError."""
    record = db.get(AlarmRecord, alarm, with_for_update=True, populate_existing=True)
    if record is None:
        raise ConfigError(f"there is no alarm {alarm}; see 'fleet alarms'")
    if record.state != AlarmState.FIRING:
        raise ConfigError(f"alarm {alarm} has resolved; there is nothing to acknowledge")
    if record.acknowledged_by is not None:
        raise ConfigError(f"alarm {alarm} was acknowledged by {record.acknowledged_by} already")
    return record


def alarm_row(record: AlarmRecord) -> AlarmRow:
    """Return an alarm as a row."""
    return AlarmRow(**{name: getattr(record, name) for name in AlarmRow.__struct_fields__})


def _event(record: AlarmEventRecord) -> AlarmEvent:
    return AlarmEvent(**{name: getattr(record, name) for name in AlarmEvent.__struct_fields__})


def rule_book(db: Session) -> AlarmRuleBook:
    """Return all rules; those of kinds that this version does not know are left out."""
    kinds = [kind.value for kind in AlarmKind]
    records = db.scalars(select(AlarmRuleRecord).where(AlarmRuleRecord.kind.in_(kinds)))
    own: dict[RuleKey, AlarmRuleValues] = {}
    for record in records:
        target = Target(Scope(record.scope), record.target)
        values = {name: getattr(record, name) for name in VALUE_NAMES}
        own[AlarmKind(record.kind), target] = AlarmRuleValues(**values)
    return AlarmRuleBook(own)
