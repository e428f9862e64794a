"""A page in a browser whose values change while a person uses it."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from fleet.http_api.api_address import ApiAddress
from fleet.operator_api.operation import OperatorRole
from fleet.protocol.report import DeviceStatus
from fleet.registry.store import Registry
from fleet.server.console.console_server import ConsoleServer
from fleet.server.console.pages.page_routes import PAGES, page_routes
from fleet.server.home import FleetHome
from fleet.server.operations.context import OperationContext
from tests.console.browser import (
    WAIT_MS,
    WIDTHS,
    Visitor,
    is_wider_than_window,
    serious_flaws,
)
from tests.fleet.operator_api.api_fleet import BUNDLE, make_fleet

FIELDS = {"{device}": "kitchen", r"{rollout:\d{1,9}}": "1"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> FleetHome:
    return make_fleet(tmp_path_factory.mktemp("fleet") / "home")


@pytest.fixture(scope="module")
def registry(home: FleetHome) -> Iterator[Registry]:
    with home.registry("tests") as registry:
        registry.operators.add("grace", OperatorRole.ADMIN)
        yield registry


@pytest.fixture(scope="module")
def server(home: FleetHome, registry: Registry) -> Iterator[ConsoleServer]:
    context = OperationContext(registry, home)
    with ConsoleServer(ApiAddress("127.0.0.1", 0), context, None, [page_routes]) as server:
        yield server


@pytest.fixture
def visitor(browser: Browser, server: ConsoleServer, registry: Registry) -> Iterator[Visitor]:
    """A narrow window of an admin who has signed in."""
    visitor = Visitor(browser, f"http://127.0.0.1:{server.port}", width=WIDTHS[0])
    link = registry.operators.make_link("grace").secret
    visitor.page.goto(f"/sign-in?link={link}")
    visitor.page.get_by_role("button", name="Sign in").click()
    visitor.page.wait_for_url("/")
    yield visitor
    visitor.check()
    visitor.close()


def report_online(registry: Registry, *, online: bool, epoch: int) -> None:
    status = DeviceStatus(
        online=online, epoch=epoch, bundle_id=BUNDLE, version="0.1.0", mode="auto"
    )
    registry.stats.record_status("kitchen", status, time.time())


def focused_address(page: Page) -> str | None:
    address: str | None = page.evaluate("document.activeElement.getAttribute('href')")
    return address


def test_values_change_in_place_and_the_keyboard_stays_where_it_is(
    visitor: Visitor, registry: Registry
) -> None:
    report_online(registry, online=True, epoch=5)
    page = visitor.page
    page.goto("/devices?search=kitchen")
    row = page.get_by_role("row", name=re.compile("kitchen"))
    expect(row).to_contain_text("online")
    row.get_by_role("link").focus()
    scroller = page.get_by_role("region", name="Table: Devices")
    scroller.evaluate("element => { element.scrollLeft = 40; }")
    report_online(registry, online=False, epoch=6)
    expect(row).to_contain_text("offline", timeout=WAIT_MS)
    assert focused_address(page) == "/devices/kitchen"
    assert scroller.evaluate("element => element.scrollLeft") == 40


def test_a_link_that_leads_elsewhere_loses_the_keyboard(
    visitor: Visitor, registry: Registry
) -> None:
    page = visitor.page
    registry.identities.move("kitchen", "house")
    page.goto("/devices?group=house&sort=name")
    first = page.locator("tbody a").first
    expect(first).to_have_attribute("href", "/devices/attic")
    first.focus()
    registry.identities.move("attic", "lab")
    expect(first).to_have_attribute("href", "/devices/kitchen", timeout=WAIT_MS)
    assert focused_address(page) is None


def test_narrow_pages_are_sound_and_their_tables_scroll_by_keyboard(visitor: Visitor) -> None:
    page = visitor.page
    for path in PAGES:
        for field, value in FIELDS.items():
            path = path.replace(field, value)
        page.goto(path)
        assert serious_flaws(page) == [], path
        assert not is_wider_than_window(page), path


def test_reload_keeps_the_filters_and_a_form_has_no_reload(visitor: Visitor) -> None:
    page = visitor.page
    page.goto("/devices?group=house&notice=changed")
    expect(page.get_by_role("link", name="Reload")).to_have_attribute(
        "href", "/devices?group=house"
    )
    page.goto("/operators")
    page.get_by_role("button", name="Make a link").first.click()
    page.get_by_role("heading", name=re.compile("Link of")).wait_for()
    assert page.get_by_role("link", name="Reload").count() == 0
