"""Operations on alarms: their list and history, acknowledgements, rules and silences."""

from __future__ import annotations

from typing import Annotated, Final

from msgspec import Meta, Struct

from fleet.operator_api.operation import NoFields, Operation, OperatorRole
from fleet.operator_api.paging import ListPage, PageQuery
from fleet.protocol.types import Amount, Text
from fleet.registry.alarms.alarm_kinds import AlarmKind
from fleet.registry.alarms.alarm_rows import (
    AlarmEvent,
    AlarmFilterState,
    AlarmRow,
    AlarmTotals,
)
from fleet.registry.alarms.rules import MAX_FOR_S, MAX_MUTE_S

AlarmIds = Annotated[tuple[Amount, ...], Meta(min_length=1, max_length=1000)]
AlarmDelay = Annotated[float, Meta(ge=0, le=MAX_FOR_S)]
MuteSpan = Annotated[float, Meta(ge=0, le=MAX_MUTE_S)]


class AlarmQuery(PageQuery, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The alarms of one page, by state, kind and subject.

    ``open`` are those that fire, which are ``firing`` until they are ``acknowledged``.
    """

    state: AlarmFilterState = "open"
    kind: AlarmKind | None = None
    subject: str | None = None


class AlarmList(ListPage, frozen=True, kw_only=True):
    """A page of alarms, the newest first."""

    alarms: list[AlarmRow]


class AlarmEventQuery(PageQuery, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The events of one page, of a kind and of a subject where they are given."""

    kind: AlarmKind | None = None
    subject: str | None = None


class AlarmEventList(ListPage, frozen=True, kw_only=True):
    """A page of events, the newest first."""

    events: list[AlarmEvent]


class Acknowledgement(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The ids of alarms to acknowledge, and a note."""

    alarms: AlarmIds
    note: Text = ""


class AcknowledgedAlarms(Struct, frozen=True, kw_only=True):
    """The alarms that were acknowledged."""

    alarms: list[AlarmRow]


class AlarmRuleQuery(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A target: ``all``, ``group:NAME`` or ``device:NAME``."""

    target: str = "all"


class MergedAlarmRule(Struct, frozen=True, kw_only=True):
    """A kind's rule as it applies to a target, as `fleet.registry.alarms.rules.AlarmRule`.

    `unit` is the meaning of its threshold, "" for a kind without one.
    """

    kind: str
    enabled: bool
    threshold: float | None
    unit: str
    for_s: float
    muted_until: float


class TargetAlarmRule(Struct, frozen=True, kw_only=True):
    """The values that a target sets itself; None leaves a value to the next wider scope."""

    kind: str
    target: str
    enabled: bool | None
    threshold: float | None
    for_s: float | None
    muted_until: float | None


class AlarmRuleList(Struct, frozen=True, kw_only=True):
    """The rules of a target, merged, and all values that targets set themselves."""

    target: str
    rules: list[MergedAlarmRule]
    own: list[TargetAlarmRule]


class AlarmRuleChange(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Values to set for a kind and a target; None leaves a value as it is."""

    target: str
    kind: AlarmKind
    enabled: bool | None = None
    threshold: float | None = None
    for_s: AlarmDelay | None = None


class AlarmRuleKey(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A kind and a target."""

    target: str
    kind: AlarmKind


class AlarmSilence(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A silence of `for_s` seconds for alarms of a target; 0 ends it. None is every kind."""

    target: str
    kind: AlarmKind | None = None
    for_s: MuteSpan


LIST_ALARMS: Final = Operation(
    method="GET",
    path="/alarms",
    role=OperatorRole.VIEWER,
    request=AlarmQuery,
    response=AlarmList,
    summary="List the alarms, the newest first, by state, kind or subject.",
)
COUNT_ALARMS: Final = Operation(
    method="GET",
    path="/alarm-totals",
    role=OperatorRole.VIEWER,
    request=NoFields,
    response=AlarmTotals,
    summary="Count the open alarms, by kind.",
)
LIST_ALARM_EVENTS: Final = Operation(
    method="GET",
    path="/alarm-events",
    role=OperatorRole.VIEWER,
    request=AlarmEventQuery,
    response=AlarmEventList,
    summary="List the history of the alarms, the newest first.",
)
ACKNOWLEDGE_ALARMS: Final = Operation(
    method="POST",
    path="/alarms/acknowledge",
    role=OperatorRole.OPERATOR,
    request=Acknowledgement,
    response=AcknowledgedAlarms,
    summary="Acknowledge alarms under the operator's name.",
)
LIST_ALARM_RULES: Final = Operation(
    method="GET",
    path="/alarm-rules",
    role=OperatorRole.VIEWER,
    request=AlarmRuleQuery,
    response=AlarmRuleList,
    summary="Show the rules of alarms as they apply to a target, and those that targets set.",
)
SET_ALARM_RULE: Final = Operation(
    method="PATCH",
    path="/alarm-rules/{target}/{kind}",
    role=OperatorRole.OPERATOR,
    request=AlarmRuleChange,
    response=AlarmRuleList,
    summary="Set the threshold or duration of a kind of alarms, or switch it on or off.",
)
UNSET_ALARM_RULE: Final = Operation(
    method="DELETE",
    path="/alarm-rules/{target}/{kind}",
    role=OperatorRole.OPERATOR,
    request=AlarmRuleKey,
    response=AlarmRuleList,
    summary="Remove what a target sets for a kind, so that a wider scope decides again.",
)
MUTE_ALARMS: Final = Operation(
    method="POST",
    path="/alarm-rules/{target}/mute",
    role=OperatorRole.OPERATOR,
    request=AlarmSilence,
    response=AlarmRuleList,
    summary="Mute alarms of a target for a time, of one kind or of all.",
)
