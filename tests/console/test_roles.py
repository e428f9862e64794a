"""Every route of the console, by role: a new route needs a row here."""

from __future__ import annotations

import re
from typing import Final

import pytest
from aiohttp import web

from fleet.operator_api.operation import PREFIX
from tests.console.console_site import LEVELS, ConsoleSite
from tests.console.web_client import Received, WebClient

API: Final = """
viewer   GET    /alarm-events
viewer   GET    /alarm-rules
viewer   GET    /alarm-totals
viewer   GET    /alarms
viewer   GET    /audit
viewer   GET    /bundles
viewer   GET    /checks
viewer   GET    /config-lags
viewer   GET    /devices
viewer   GET    /devices/{device}
viewer   GET    /enrolment-tokens
viewer   GET    /identities
viewer   GET    /identities/{name}
viewer   GET    /keys
viewer   GET    /rollouts
viewer   GET    /rollouts/{rollout}
viewer   GET    /sessions
viewer   GET    /settings/{target}
viewer   GET    /software
viewer   GET    /software/updates
viewer   GET    /statistics/bundles
viewer   GET    /statistics/devices
viewer   GET    /statistics/groups
viewer   GET    /statistics/hours
viewer   GET    /workers
operator DELETE /alarm-rules/{target}/{kind}
operator PATCH  /alarm-rules/{target}/{kind}
operator PATCH  /settings/{target}
operator POST   /alarm-rules/{target}/mute
operator POST   /alarms/acknowledge
operator POST   /devices/{device}/prompts
operator POST   /rollouts
operator POST   /rollouts/pause
operator POST   /rollouts/resume
operator POST   /rollouts/roll-back
operator POST   /settings/{target}/unset
operator POST   /software/{version}/roll-out
operator PUT    /bundles/{bundle}/name
admin    DELETE /bundles/{bundle}
admin    DELETE /identities/{name}
admin    DELETE /keys/{key_id}
admin    DELETE /operator-keys/{key_id}
admin    DELETE /operators/{name}
admin    GET    /operator-keys
admin    GET    /operators
admin    PATCH  /devices/{device}/tags
admin    POST   /identities
admin    POST   /identities/{name}/allow
admin    POST   /identities/{name}/disallow
admin    POST   /identities/{name}/invite
admin    POST   /identities/{name}/resume
admin    POST   /identities/{name}/revoke
admin    POST   /identities/{name}/suspend
admin    POST   /keys
admin    POST   /operators
admin    POST   /operators/{name}/keys
admin    POST   /operators/{name}/links
admin    PUT    /devices/{device}/group
admin    PUT    /operators/{name}/role
"""
"""The least role of each route of the API."""

OTHERS: Final = r"""
public   GET  /healthz
public   GET  /sign-in
public   GET  /static/{digest}/{name}
public   POST /sign-in
viewer   GET  /
viewer   GET  /audit
viewer   GET  /bundles
viewer   GET  /devices
viewer   GET  /devices/{device}
viewer   GET  /doctor
viewer   GET  /enrolment
viewer   GET  /identities
viewer   GET  /rollouts
viewer   GET  /rollouts/{rollout}
viewer   GET  /sessions
viewer   GET  /settings
viewer   GET  /workers
viewer   POST /sign-out
operator GET  /playground
operator GET  /rollouts/new
operator POST /bundles/{bundle}/{change}
operator POST /playground
operator POST /rollouts
operator POST /rollouts/{rollout}/{change}
operator POST /settings
admin    GET  /operators
admin    POST /devices/{device}/{change}
admin    POST /enrolment
admin    POST /operators
admin    POST /operators/{name}/{change}
"""
"""The least role of each other route; public needs no session."""


def rows(table: str, prefix: str = "") -> dict[tuple[str, str], str]:
    """Return the role of each route, by method and path."""
    lines = [line.split() for line in table.strip().splitlines()]
    return {(method, prefix + path): role for role, method, path in lines}


EXAMPLES: Final = {
    "/rollouts/{rollout}": "/rollouts/999",
    "/rollouts/{rollout}/{change}": "/rollouts/999/pause",
    "/bundles/{bundle}/{change}": "/bundles/no-such-thing/name",
    "/devices/{device}/{change}": "/devices/no-such-thing/suspend",
    "/operators/{name}/{change}": "/operators/no-such-thing/remove",
}
"""Paths whose fields have to be of a kind."""

ROLES: Final = rows(API, PREFIX) | rows(OTHERS)


def ask(client: WebClient, method: str, path: str) -> Received:
    """Send a request with a body that no operation accepts; an unknown page is no page."""
    path = re.sub(r"\{\w+\}", "no-such-thing", EXAMPLES.get(path, path))
    if method == "GET":
        return client.get(path)
    if path.startswith(PREFIX):
        return client.post_json(path, {}, method)
    return client.post_form(path)


def is_refused(received: Received) -> bool:
    """Whether a request came no further than the check of the session and the role."""
    leads_to_sign_in = received.status == 303 and is_sign_in(received.headers["Location"])
    return received.status in (401, 403) or leads_to_sign_in


def is_sign_in(address: str) -> bool:
    return address.partition("?")[0] == "/sign-in"


def test_every_route_has_a_row(site: ConsoleSite) -> None:
    routes = site.server._application().router.routes()
    served = {
        (route.method, route.resource.canonical)
        for route in routes
        if isinstance(route, web.AbstractRoute) and route.resource and route.method != "HEAD"
    }
    assert served == set(ROLES)


@pytest.mark.parametrize("level", LEVELS)
def test_a_role_reaches_the_routes_of_its_rows_and_no_other(site: ConsoleSite, level: str) -> None:
    wrong = []
    for (method, path), least in ROLES.items():
        if path in ("/sign-in", "/sign-out"):
            continue  # each has tests of its own
        received = ask(site.clients[level], method, path)
        if is_refused(received) == (LEVELS.index(level) >= LEVELS.index(least)):
            wrong.append((method, path, received.status, received.text[:200]))
    assert not wrong
