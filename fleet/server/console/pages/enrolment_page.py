"""Identities, enrolment tokens, and a new device."""

from __future__ import annotations

from typing import Final

from aiohttp import web

from fleet.identity.enrolment import Enrolment
from fleet.operator_api.identity_operations import (
    ENROLL,
    LIST_IDENTITIES,
    LIST_TOKENS,
    EnrolmentOrder,
    IdentityQuery,
    Invitation,
)
from fleet.operator_api.operation import NoFields
from fleet.protocol.access import Role
from fleet.server.console.pages.page import Page, result_of
from fleet.server.console.qr_code import qr_code

PAGE_ROWS: Final = 50


async def enrolment_page(page: Page) -> web.StreamResponse:
    """Show the open tokens, and the form for a new device."""
    return await _show(page)


async def enroll_device_form(page: Page) -> web.StreamResponse:
    """Enrol a device; show its token once, as a line to paste and as a QR code."""
    form = await page.form()
    name = form.get("name", "").strip()
    group = form.get("group", "").strip() or None
    order = EnrolmentOrder(enrolments=(Enrolment(name=name, group=group),))
    made, problem = await result_of(page.call(ENROLL, order))
    if made is None:
        return await _show(page, problem=problem, name=name, group=group or "")
    return await _show(page, invitation=made.invitations[0])


async def identities_page(page: Page) -> web.StreamResponse:
    """Show the identities."""
    role = page.query("role")
    query = IdentityQuery(
        role=Role(role) if role in list(Role) else None,
        after=page.query("after"),
        limit=PAGE_ROWS,
    )
    found = await page.call(LIST_IDENTITIES, query)
    return page.show(
        "identities.html",
        identities=found.identities,
        roles=list(Role),
        role=role,
        next_address=found.next_page and page.address(after=found.next_page),
    )


async def _show(
    page: Page,
    *,
    problem: str = "",
    name: str = "",
    group: str = "",
    invitation: Invitation | None = None,
) -> web.Response:
    found = await page.call(LIST_TOKENS, NoFields())
    return page.show(
        "enrolment.html",
        400 if problem else 200,
        tokens=found.tokens,
        problem=problem,
        name=name,
        group=group,
        invitation=invitation,
        qr_code=qr_code(invitation.command) if invitation else "",
    )
