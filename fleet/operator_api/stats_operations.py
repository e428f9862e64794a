"""Operations on statistics, sessions and workers."""

from __future__ import annotations

from typing import Final

from msgspec import Struct

from fleet.operator_api.operation import NoFields, Operation, OperatorRole
from fleet.operator_api.paging import ListPage, PageQuery
from fleet.protocol.types import Timestamp
from fleet.registry.results import (
    BundleStats,
    GroupStats,
    HourStats,
    SessionRow,
    StatsRow,
    WorkerRow,
)


class StatsWindow(PageQuery, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The answers to count: from `since` on, of one device, of a group's devices, or of all.

    `since` is in seconds since 1970.
    """

    since: Timestamp | None = None
    group: str | None = None
    device: str | None = None


class DeviceStatsList(ListPage, frozen=True, kw_only=True):
    """A page of statistics by device, by name."""

    rows: list[StatsRow]


class GroupStatsList(ListPage, frozen=True, kw_only=True):
    """A page of statistics by group, by name."""

    rows: list[GroupStats]


class BundleStatsList(ListPage, frozen=True, kw_only=True):
    """A page of statistics by bundle, by id."""

    rows: list[BundleStats]


class HourStatsList(ListPage, frozen=True, kw_only=True):
    """A page of statistics by hour, the oldest first."""

    rows: list[HourStats]


class SessionQuery(PageQuery, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The sessions of one page, of one device or of all."""

    device: str | None = None


class SessionList(ListPage, frozen=True, kw_only=True):
    """A page of sessions, the newest first."""

    sessions: list[SessionRow]


class WorkerList(Struct, frozen=True, kw_only=True):
    """The workers, by name."""

    workers: list[WorkerRow]


LIST_DEVICE_STATS: Final = Operation(
    method="GET",
    path="/statistics/devices",
    role=OperatorRole.VIEWER,
    request=StatsWindow,
    response=DeviceStatsList,
    summary="Count the answers of each device: sources of tokens, latency, changes of mode.",
)
LIST_GROUP_STATS: Final = Operation(
    method="GET",
    path="/statistics/groups",
    role=OperatorRole.VIEWER,
    request=StatsWindow,
    response=GroupStatsList,
    summary="Count the answers of each group of devices.",
)
LIST_BUNDLE_STATS: Final = Operation(
    method="GET",
    path="/statistics/bundles",
    role=OperatorRole.VIEWER,
    request=StatsWindow,
    response=BundleStatsList,
    summary="Count the answers of each bundle.",
)
LIST_HOUR_STATS: Final = Operation(
    method="GET",
    path="/statistics/hours",
    role=OperatorRole.VIEWER,
    request=StatsWindow,
    response=HourStatsList,
    summary="Count the answers that began in each hour; without `since`, of the last day.",
)
LIST_SESSIONS: Final = Operation(
    method="GET",
    path="/sessions",
    role=OperatorRole.VIEWER,
    request=SessionQuery,
    response=SessionList,
    summary="List the latest sessions between devices and workers.",
)
LIST_WORKERS: Final = Operation(
    method="GET",
    path="/workers",
    role=OperatorRole.VIEWER,
    request=NoFields,
    response=WorkerList,
    summary="List the workers: online or not, draining, bundles, number of sessions.",
)
