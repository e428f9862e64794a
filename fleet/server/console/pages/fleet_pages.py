"""Workers, bundles, roll-outs, sessions, changes and checks."""

from __future__ import annotations

from typing import Final

from aiohttp import web

from fleet.operator_api.audit_operations import CHECK_FLEET, LIST_CHANGES, AuditQuery
from fleet.operator_api.bundle_operations import (
    LIST_BUNDLES,
    LIST_ROLLOUTS,
    PAUSE_ROLLOUT,
    RESUME_ROLLOUT,
    ROLL_BACK,
    SHOW_ROLLOUT,
    RolloutChoice,
    RolloutKey,
    RolloutQuery,
    RolloutUndoing,
)
from fleet.operator_api.operation import NoFields
from fleet.operator_api.stats_operations import (
    LIST_BUNDLE_STATS,
    LIST_SESSIONS,
    LIST_WORKERS,
    SessionQuery,
    StatsWindow,
)
from fleet.server.console.pages.page import Page, see

PAGE_ROWS: Final = 50


async def workers_page(page: Page) -> web.StreamResponse:
    """Show the workers."""
    found = await page.call(LIST_WORKERS, NoFields())
    return page.show("workers.html", workers=found.workers)


async def bundles_page(page: Page) -> web.StreamResponse:
    """Show the bundles, and the answers of each."""
    bundles = await page.call(LIST_BUNDLES, NoFields())
    stats = await page.call(LIST_BUNDLE_STATS, StatsWindow(limit=1000))
    by_bundle = {row.bundle_id: row for row in stats.rows}
    return page.show("bundles.html", bundles=bundles.bundles, stats=by_bundle)


async def rollouts_page(page: Page) -> web.StreamResponse:
    """Show the roll-outs, the newest first."""
    query = RolloutQuery(after=page.query("after"), limit=PAGE_ROWS)
    found = await page.call(LIST_ROLLOUTS, query)
    return page.show(
        "rollouts.html",
        rollouts=found.rollouts,
        next_address=found.next_page and page.address(after=found.next_page),
    )


async def rollout_page(page: Page) -> web.StreamResponse:
    """Show one roll-out."""
    row = await page.call(SHOW_ROLLOUT, RolloutKey(rollout=_rollout_id(page)))
    return page.show("rollout.html", rollout=row)


async def change_rollout_form(page: Page) -> web.StreamResponse:
    """Pause, resume or roll back a roll-out."""
    rollout = _rollout_id(page)
    match page.request.match_info["change"]:
        case "pause":
            await page.call(PAUSE_ROLLOUT, RolloutChoice(rollout=rollout))
            notice = "paused"
        case "resume":
            await page.call(RESUME_ROLLOUT, RolloutChoice(rollout=rollout))
            notice = "resumed"
        case _:
            await page.call(ROLL_BACK, RolloutUndoing(rollout=rollout))
            notice = "rolled-back"
    return see(f"/rollouts/{rollout}", notice)


async def sessions_page(page: Page) -> web.StreamResponse:
    """Show the latest sessions."""
    query = SessionQuery(device=page.query("device"), after=page.query("after"), limit=PAGE_ROWS)
    found = await page.call(LIST_SESSIONS, query)
    return page.show(
        "sessions.html",
        sessions=found.sessions,
        device=query.device,
        next_address=found.next_page and page.address(after=found.next_page),
    )


async def audit_page(page: Page) -> web.StreamResponse:
    """Show the audit log."""
    query = AuditQuery(
        subject=page.query("subject"),
        action=page.query("action"),
        after=page.query("after"),
        limit=PAGE_ROWS,
    )
    found = await page.call(LIST_CHANGES, query)
    return page.show(
        "audit.html",
        changes=found.changes,
        query=query,
        next_address=found.next_page and page.address(after=found.next_page),
    )


async def checks_page(page: Page) -> web.StreamResponse:
    """Show the checks of `fleet doctor`."""
    found = await page.call(CHECK_FLEET, NoFields())
    return page.show("doctor.html", checks=found.checks)


def _rollout_id(page: Page) -> int:
    return int(page.request.match_info["rollout"])
