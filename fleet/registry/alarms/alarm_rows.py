"""Alarms, their events and their rules, as the repository returns them."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from fleet.registry.alarms.alarm_kinds import AlarmKind

AlarmFilterState = Literal["open", "firing", "acknowledged", "resolved", "all"]


class AlarmRow(Struct, frozen=True, kw_only=True):
    """The newest alarm of a kind about a subject; `kind` and `subject` are as in `AlarmKind`.

    `state` is its `AlarmState`. `value` was measured and `threshold` is that of its rule, both None
    for a kind without them. Events do not tell of it before `muted_until`. Times are in seconds
    since 1970.
    """

    id: int
    kind: str
    subject: str
    state: str
    summary: str
    value: float | None
    threshold: float | None
    fired_at: float
    resolved_at: float | None
    muted_until: float | None
    acknowledged_by: str | None
    acknowledged_at: float | None
    note: str


class AlarmEvent(Struct, frozen=True, kw_only=True):
    """A change of an alarm: `state` is its `AlarmChange`, `at` its time in seconds since 1970.

    `id` grows with every event of the fleet, and `alarm` is the id of the alarm. `by` is the
    operator who acknowledged it, or the server.
    """

    id: int
    alarm: int
    kind: str
    subject: str
    state: str
    summary: str
    value: float | None
    threshold: float | None
    at: float
    by: str
    note: str


class AlarmFilter(Struct, frozen=True, kw_only=True):
    """The alarms to list.

    ``open`` are those that fire, which are ``firing`` until they are ``acknowledged``.
    """

    state: AlarmFilterState = "open"
    kind: AlarmKind | None = None
    subject: str | None = None


class AlarmTotals(Struct, frozen=True, kw_only=True):
    """The number of open alarms, of those of them that are acknowledged, and of each kind."""

    open: int
    acknowledged: int
    by_kind: dict[str, int]
