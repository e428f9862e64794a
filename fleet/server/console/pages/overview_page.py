"""The overview."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from aiohttp import web

from fleet.operator_api.audit_operations import LIST_CHANGES, AuditQuery
from fleet.operator_api.bundle_operations import LIST_ROLLOUTS, RolloutQuery
from fleet.operator_api.device_operations import LIST_DEVICES, DeviceQuery
from fleet.operator_api.operation import NoFields
from fleet.operator_api.settings_operations import LIST_CONFIG_LAGS, LagQuery
from fleet.operator_api.stats_operations import LIST_GROUP_STATS, LIST_WORKERS, StatsWindow
from fleet.protocol.modes import offload_rate
from fleet.protocol.types import DAY_S
from fleet.registry.results import GroupStats
from fleet.server.console.pages.page import Page

NUM_LAGS = 5


async def overview_page(page: Page) -> web.StreamResponse:
    """Show the fleet at a glance: devices, workers, answers of a day, and what is under way."""
    since = time.time() - DAY_S
    online = await page.call(LIST_DEVICES, DeviceQuery(online=True, limit=1))
    devices = await page.call(LIST_DEVICES, DeviceQuery(limit=1))
    workers = await page.call(LIST_WORKERS, NoFields())
    groups = await page.call(LIST_GROUP_STATS, StatsWindow(since=since, limit=1000))
    week = await page.call(LIST_GROUP_STATS, StatsWindow(since=since - 6 * DAY_S, limit=1000))
    rollouts = await page.call(LIST_ROLLOUTS, RolloutQuery(limit=5))
    lags = await page.call(LIST_CONFIG_LAGS, LagQuery(limit=NUM_LAGS))
    changes = await page.call(LIST_CHANGES, AuditQuery(limit=8))
    sources = summed_sources(groups.rows)
    return page.show(
        "overview.html",
        num_online=online.total,
        num_devices=devices.total,
        workers=workers.workers,
        groups=groups.rows,
        sources=sources,
        offload=_offload(sources),
        week_offload=_offload(summed_sources(week.rows)),
        answers=sum(row.generations for row in groups.rows),
        errors=sum(row.errors for row in groups.rows),
        rollouts=[row for row in rollouts.rollouts if row.ended_at is None],
        lags=lags.lags,
        changes=changes.changes,
    )


def _offload(sources: Mapping[str, int]) -> float | None:
    return offload_rate(sources) if sum(sources.values()) else None


def summed_sources(rows: Sequence[GroupStats]) -> dict[str, int]:
    """Return the tokens of all groups by source."""
    sums: dict[str, int] = {}
    for row in rows:
        for source, tokens in row.sources.items():
            sums[source] = sums.get(source, 0) + tokens
    return sums
