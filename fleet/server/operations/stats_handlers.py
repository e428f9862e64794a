"""Operations on statistics, sessions and workers."""

from __future__ import annotations

import time
from typing import Any, Final

from msgspec.structs import replace

from fleet.errors import ConfigError
from fleet.operator_api.operation import NoFields
from fleet.operator_api.stats_operations import (
    LIST_BUNDLE_STATS,
    LIST_DEVICE_STATS,
    LIST_GROUP_STATS,
    LIST_HOUR_STATS,
    LIST_SESSIONS,
    LIST_WORKERS,
    BundleStatsList,
    DeviceStatsList,
    GroupStatsList,
    HourStatsList,
    SessionList,
    SessionQuery,
    StatsWindow,
    WorkerList,
)
from fleet.protocol.types import DAY_S
from fleet.registry.results import BundleStats, GroupStats, HourStats
from fleet.registry.stats.queries import By
from fleet.server.operations.context import Handlers, OperationContext
from fleet.server.operations.pages import number_of, page_of, unknown_page


def _list_device_stats(context: OperationContext, window: StatsWindow) -> DeviceStatsList:
    """Return a page of statistics by device. Raises UnknownDeviceError."""
    counts = context.registry.stats.per_device(window.device, window.since, group=window.group)
    rows, next_page = page_of(counts, window, lambda row: row.device)
    return DeviceStatsList(rows=rows, next_page=next_page)


def _list_group_stats(context: OperationContext, window: StatsWindow) -> GroupStatsList:
    """Return a page of statistics by group. Raises UnknownDeviceError."""
    counts: list[GroupStats] = _grouped(context, By.GROUP, window)
    rows, next_page = page_of(counts, window, lambda row: row.group or "")
    return GroupStatsList(rows=rows, next_page=next_page)


def _list_bundle_stats(context: OperationContext, window: StatsWindow) -> BundleStatsList:
    """Return a page of statistics by bundle. Raises UnknownDeviceError."""
    counts: list[BundleStats] = _grouped(context, By.BUNDLE, window)
    rows, next_page = page_of(counts, window, lambda row: row.bundle_id)
    return BundleStatsList(rows=rows, next_page=next_page)


def _list_hour_stats(context: OperationContext, window: StatsWindow) -> HourStatsList:
    """Return a page of statistics by hour. Raises UnknownDeviceError."""
    if window.since is None:
        window = replace(window, since=time.time() - DAY_S)
    counts: list[HourStats] = _grouped(context, By.HOUR, window)
    rows, next_page = page_of(counts, window, lambda row: f"{row.hour_at:012.0f}")
    return HourStatsList(rows=rows, next_page=next_page)


def _grouped(context: OperationContext, by: By, window: StatsWindow) -> list[Any]:
    """Return rows of the type that `by` has."""
    stats = context.registry.stats
    return [*stats.grouped(by, window.device, window.since, group=window.group)]


def _list_sessions(context: OperationContext, query: SessionQuery) -> SessionList:
    """Return a page of sessions. Raises UnknownDeviceError."""
    before = None if query.after is None else _parse_position(query.after)
    found = context.registry.stats.numbered_sessions(query.device, query.limit + 1, before=before)
    numbers = list(found)[: query.limit]
    next_page = None
    if len(found) > query.limit:
        last = numbers[-1]
        next_page = f"{found[last].opened_at!r}_{last}"
    return SessionList(sessions=[found[each] for each in numbers], next_page=next_page)


def _parse_position(after: str) -> tuple[float, int]:
    """Return the time and the number of the last session of a page. Raises ConfigError."""
    opened_at, _, number = after.partition("_")
    try:
        return float(opened_at), number_of(number)
    except (ValueError, ConfigError):
        raise unknown_page(after) from None


def _list_workers(context: OperationContext, _: NoFields) -> WorkerList:
    """Return the workers."""
    return WorkerList(workers=context.registry.stats.workers())


STATS_HANDLERS: Final[Handlers] = {
    LIST_DEVICE_STATS: _list_device_stats,
    LIST_GROUP_STATS: _list_group_stats,
    LIST_BUNDLE_STATS: _list_bundle_stats,
    LIST_HOUR_STATS: _list_hour_stats,
    LIST_SESSIONS: _list_sessions,
    LIST_WORKERS: _list_workers,
}
