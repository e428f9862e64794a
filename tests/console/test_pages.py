"""Every page of the console in a browser: each colour scheme, width, and without scripts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

import pytest
from playwright.sync_api import Browser

from fleet.operator_api.operation import PREFIX, OperatorRole
from fleet.server.console.console_server import ConsoleServer
from tests.console.browser import (
    LOOKS,
    Scheme,
    Visitor,
    internal_paths,
    is_wider_than_window,
    serious_flaws,
)
from tests.console.console_site import ConsoleSite
from tests.console.running_fleet import DEVICES, RunningFleet
from tests.console.web_client import WebClient

NO_PAGES: Final = (PREFIX, "/static/", "/healthz")
FIELDS: Final = {"device": DEVICES[0], "rollout": "1"}
"""A value of each field in the paths of pages."""


def page_paths(server: ConsoleServer) -> list[str]:
    """Return the path of every page, from the routes of the server."""
    routes = server._application().router.routes()
    paths = {
        route.resource.canonical for route in routes if route.method == "GET" and route.resource
    }
    pages = sorted(path for path in paths if not path.startswith(NO_PAGES))
    return [re.sub(r"\{(\w+)\}", lambda field: FIELDS[field[1]], path) for path in pages]


@pytest.fixture(scope="module")
def paths(site: ConsoleSite) -> list[str]:
    return page_paths(site.server)


def sign_in(visitor: Visitor, fleet: RunningFleet) -> WebClient:
    """Give the browser the session of an admin; return a client with the same session."""
    client = fleet.client_of(OperatorRole.ADMIN)
    for name, value in client.cookies.items():
        visitor.context.add_cookies([{"name": name, "value": value, "url": fleet.url}])
    return client


@pytest.fixture
def visitor(browser: Browser, fleet: RunningFleet) -> Iterator[Visitor]:
    visitor = Visitor(browser, fleet.url)
    yield visitor
    visitor.close()


@pytest.mark.parametrize(("scheme", "width"), LOOKS)
def test_every_page_is_sound(
    browser: Browser, fleet: RunningFleet, paths: list[str], scheme: Scheme, width: int
) -> None:
    visitor = Visitor(browser, fleet.url, scheme=scheme, width=width)
    sign_in(visitor, fleet)
    page = visitor.page
    for path in paths:
        response = page.goto(path)
        assert response is not None
        assert response.status == 200, path
        assert page.title(), path
        assert page.get_by_role("heading", level=1).count() == 1, path
        assert serious_flaws(page) == [], path
        assert not is_wider_than_window(page), path
        visitor.check()
    visitor.close()


def test_every_link_leads_to_a_page(
    visitor: Visitor, fleet: RunningFleet, paths: list[str]
) -> None:
    client = sign_in(visitor, fleet)
    page = visitor.page
    seen: dict[str, int] = {}
    for path in paths:
        page.goto(path)
        for link in internal_paths(page):
            seen.setdefault(link, client.get(link).status)
    assert {link: status for link, status in seen.items() if status not in (200, 303)} == {}


def test_every_page_is_read_without_scripts(
    browser: Browser, fleet: RunningFleet, paths: list[str]
) -> None:
    visitor = Visitor(browser, fleet.url, scripts=False)
    sign_in(visitor, fleet)
    page = visitor.page
    for path in paths:
        page.goto(path)
        heading = page.get_by_role("heading", level=1).inner_text()
        assert len(page.get_by_role("main").inner_text()) > len(heading), path
        visitor.check()
    visitor.close()


def test_the_keyboard_alone_signs_in(visitor: Visitor, fleet: RunningFleet) -> None:
    page = visitor.page
    page.goto(fleet.new_link(OperatorRole.ADMIN))
    while page.evaluate("document.activeElement.tagName") != "BUTTON":
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_url("/")
    assert visitor.context.cookies()
