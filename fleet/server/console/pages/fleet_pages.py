"""Workers, sessions, changes and checks."""

from __future__ import annotations

from typing import Final

from aiohttp import web

from fleet.operator_api.audit_operations import CHECK_FLEET, LIST_CHANGES, AuditQuery
from fleet.operator_api.operation import NoFields
from fleet.operator_api.stats_operations import (
    LIST_SESSIONS,
    LIST_WORKERS,
    SessionQuery,
)
from fleet.server.console.pages.page import Page

PAGE_ROWS: Final = 50


async def workers_page(page: Page) -> web.StreamResponse:
    """Show the workers."""
    found = await page.call(LIST_WORKERS, NoFields())
    return page.show("workers.html", workers=found.workers)


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
