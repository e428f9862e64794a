"""The routes of all pages."""

from __future__ import annotations

from functools import partial
from typing import Final

from aiohttp import web

from fleet.server.console.blocking_calls import BlockingCalls
from fleet.server.console.pages.bundle_pages import bundles_page, change_bundle_form
from fleet.server.console.pages.device_pages import change_device_form, device_page, devices_page
from fleet.server.console.pages.enrolment_page import (
    enroll_device_form,
    enrolment_page,
    identities_page,
)
from fleet.server.console.pages.fleet_pages import (
    audit_page,
    checks_page,
    sessions_page,
    workers_page,
)
from fleet.server.console.pages.operator_page import (
    add_operator_form,
    change_operator_form,
    operators_page,
)
from fleet.server.console.pages.overview_page import overview_page
from fleet.server.console.pages.page import Page, PageHandler
from fleet.server.console.pages.rollout_pages import (
    change_rollout_form,
    new_rollout_page,
    rollout_page,
    rollouts_page,
    start_rollout_form,
)
from fleet.server.console.pages.settings_page import change_settings_form, settings_page
from fleet.server.operations.context import OperationContext

PAGES: Final[dict[str, PageHandler]] = {
    "/": overview_page,
    "/devices": devices_page,
    "/devices/{device}": device_page,
    "/workers": workers_page,
    "/bundles": bundles_page,
    "/rollouts": rollouts_page,
    "/rollouts/new": new_rollout_page,
    r"/rollouts/{rollout:\d{1,9}}": rollout_page,
    "/sessions": sessions_page,
    "/settings": settings_page,
    "/enrolment": enrolment_page,
    "/identities": identities_page,
    "/audit": audit_page,
    "/doctor": checks_page,
    "/operators": operators_page,
}
FORMS: Final[dict[str, PageHandler]] = {
    "/bundles/{bundle}/{change:name|remove}": change_bundle_form,
    "/devices/{device}/{change:suspend|resume|revoke|group|tags}": change_device_form,
    "/rollouts": start_rollout_form,
    r"/rollouts/{rollout:\d{1,9}}/{change:pause|resume|roll-back}": change_rollout_form,
    "/settings": change_settings_form,
    "/enrolment": enroll_device_form,
    "/operators": add_operator_form,
    "/operators/{name}/{change:link|remove|role}": change_operator_form,
}


def page_routes(context: OperationContext, calls: BlockingCalls) -> list[web.RouteDef]:
    """Return the routes of the pages and of their forms."""

    async def answer(handler: PageHandler, request: web.Request) -> web.StreamResponse:
        return await handler(Page(request, context, calls))

    return [
        *(web.get(path, partial(answer, handler)) for path, handler in PAGES.items()),
        *(web.post(path, partial(answer, handler)) for path, handler in FORMS.items()),
    ]
