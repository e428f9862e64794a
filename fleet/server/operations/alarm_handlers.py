"""Operations on alarms: their list and history, acknowledgements, rules and silences."""

from __future__ import annotations

from typing import Final

from msgspec.structs import asdict

from fleet.operator_api.alarm_operations import (
    ACKNOWLEDGE_ALARMS,
    COUNT_ALARMS,
    LIST_ALARM_EVENTS,
    LIST_ALARM_RULES,
    LIST_ALARMS,
    MUTE_ALARMS,
    SET_ALARM_RULE,
    UNSET_ALARM_RULE,
    AcknowledgedAlarms,
    Acknowledgement,
    AlarmEventList,
    AlarmEventQuery,
    AlarmList,
    AlarmQuery,
    AlarmRuleChange,
    AlarmRuleKey,
    AlarmRuleList,
    AlarmRuleQuery,
    AlarmSilence,
    MergedAlarmRule,
    TargetAlarmRule,
)
from fleet.operator_api.operation import NoFields
from fleet.registry.alarms.alarm_kinds import AlarmKind
from fleet.registry.alarms.alarm_rows import AlarmFilter, AlarmTotals
from fleet.registry.alarms.rules import THRESHOLDS, AlarmRule, AlarmRuleValues, kinds_of
from fleet.registry.targets import Target
from fleet.server.operations.context import Handlers, OperationContext
from fleet.server.operations.pages import next_number, number_of


def _list_alarms(context: OperationContext, query: AlarmQuery) -> AlarmList:
    """Return a page of alarms."""
    wanted = AlarmFilter(state=query.state, kind=query.kind, subject=query.subject)
    before = None if query.after is None else number_of(query.after)
    rows = context.registry.alarms.page(wanted, query.limit + 1, before=before)
    next_page = next_number([row.id for row in rows], query.limit)
    return AlarmList(alarms=rows[: query.limit], next_page=next_page)


def _count_alarms(context: OperationContext, _: NoFields) -> AlarmTotals:
    """Return the numbers of open alarms."""
    return context.registry.alarms.totals()


def _list_alarm_events(context: OperationContext, query: AlarmEventQuery) -> AlarmEventList:
    """Return a page of events."""
    before = None if query.after is None else number_of(query.after)
    rows = context.registry.alarms.events(query.kind, query.subject, query.limit + 1, before=before)
    next_page = next_number([row.id for row in rows], query.limit)
    return AlarmEventList(events=rows[: query.limit], next_page=next_page)


def _acknowledge(context: OperationContext, request: Acknowledgement) -> AcknowledgedAlarms:
    """Acknowledge alarms. Raises ConfigError."""
    alarms = context.registry.alarms.acknowledge(request.alarms, request.note)
    return AcknowledgedAlarms(alarms=alarms)


def _list_alarm_rules(context: OperationContext, query: AlarmRuleQuery) -> AlarmRuleList:
    """Return the rules of a target. Raises ConfigError, TopicError, UnknownDeviceError."""
    return _rules_of(context, Target.parse(query.target))


def _set_alarm_rule(context: OperationContext, change: AlarmRuleChange) -> AlarmRuleList:
    """Set values of a rule. Raises ConfigError, TopicError, UnknownDeviceError."""
    target = Target.parse(change.target)
    values = AlarmRuleValues(enabled=change.enabled, threshold=change.threshold, for_s=change.for_s)
    context.registry.alarms.set_rule(change.kind, target, values)
    return _rules_of(context, target)


def _unset_alarm_rule(context: OperationContext, request: AlarmRuleKey) -> AlarmRuleList:
    """Remove a target's rule. Raises as `_set_alarm_rule`."""
    target = Target.parse(request.target)
    context.registry.alarms.delete_rule(request.kind, target)
    return _rules_of(context, target)


def _mute_alarms(context: OperationContext, silence: AlarmSilence) -> AlarmRuleList:
    """Mute alarms of a target. Raises as `_set_alarm_rule`."""
    target = Target.parse(silence.target)
    kinds = kinds_of(target.scope) if silence.kind is None else [silence.kind]
    context.registry.alarms.mute(kinds, target, silence.for_s)
    return _rules_of(context, target)


def _rules_of(context: OperationContext, target: Target) -> AlarmRuleList:
    alarms = context.registry.alarms
    merged = alarms.merged_rules(target)
    own = alarms.rules().own
    return AlarmRuleList(
        target=str(target),
        rules=[_merged_rule(kind, rule) for kind, rule in merged.items()],
        own=[
            TargetAlarmRule(kind=kind, target=str(each), **asdict(own[kind, each]))
            for kind, each in sorted(own)
        ],
    )


def _merged_rule(kind: AlarmKind, rule: AlarmRule) -> MergedAlarmRule:
    known = THRESHOLDS.get(kind)
    return MergedAlarmRule(kind=kind, unit=known.unit if known else "", **asdict(rule))


ALARM_HANDLERS: Final[Handlers] = {
    LIST_ALARMS: _list_alarms,
    COUNT_ALARMS: _count_alarms,
    LIST_ALARM_EVENTS: _list_alarm_events,
    ACKNOWLEDGE_ALARMS: _acknowledge,
    LIST_ALARM_RULES: _list_alarm_rules,
    SET_ALARM_RULE: _set_alarm_rule,
    UNSET_ALARM_RULE: _unset_alarm_rule,
    MUTE_ALARMS: _mute_alarms,
}
