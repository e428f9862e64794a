"""The operators of the console."""

from __future__ import annotations

from aiohttp import web

from fleet.operator_api.operation import NoFields, OperatorRole
from fleet.operator_api.operator_operations import (
    ADD_OPERATOR,
    LIST_OPERATORS,
    MAKE_OPERATOR_LINK,
    REMOVE_OPERATOR,
    SET_OPERATOR_ROLE,
    NewOperator,
    OperatorLink,
    OperatorName,
)
from fleet.server.console.pages.page import Page, result_of, see

PATH = "/operators"


async def operators_page(page: Page) -> web.StreamResponse:
    """Show the operators."""
    return await _show(page)


async def add_operator_form(page: Page) -> web.StreamResponse:
    """Add an operator; show the link once."""
    form = await page.form()
    name = form.get("name", "").strip()
    role = form.get("role", "")
    chosen = OperatorRole(role) if role in list(OperatorRole) else OperatorRole.VIEWER
    link, problem = await result_of(page.call(ADD_OPERATOR, NewOperator(name=name, role=chosen)))
    return await _show(page, problem=problem, name=name if problem else "", link=link)


async def change_operator_form(page: Page) -> web.StreamResponse:
    """Make a link for an operator, change the role, or remove the operator."""
    name = page.request.match_info["name"]
    form = await page.form()
    if page.request.match_info["change"] == "link":
        return await _show(page, link=await page.call(MAKE_OPERATOR_LINK, OperatorName(name=name)))
    if page.request.match_info["change"] == "remove":
        await page.call(REMOVE_OPERATOR, OperatorName(name=name))
        return see(PATH, "removed")
    role = form.get("role", "")
    if role in list(OperatorRole):
        await page.call(SET_OPERATOR_ROLE, NewOperator(name=name, role=OperatorRole(role)))
    return see(PATH)


async def _show(
    page: Page, *, problem: str = "", name: str = "", link: OperatorLink | None = None
) -> web.Response:
    found = await page.call(LIST_OPERATORS, NoFields())
    return page.show(
        "operators.html",
        400 if problem else 200,
        operators=found.operators,
        roles=list(OperatorRole),
        problem=problem,
        name=name,
        link=link,
    )
