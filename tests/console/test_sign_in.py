"""Signing in and out in a browser, with and without scripts, and the pages about problems."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser

from fleet.operator_api.operation import OperatorRole
from tests.console.browser import LOOKS, Scheme, Visitor, serious_flaws
from tests.console.running_fleet import RunningFleet


@pytest.fixture(params=[True, False], ids=["scripts", "no scripts"])
def visitor(
    request: pytest.FixtureRequest, browser: Browser, fleet: RunningFleet
) -> Iterator[Visitor]:
    visitor = Visitor(browser, fleet.url, scripts=request.param)
    yield visitor
    visitor.close()


def test_a_link_signs_in_once_and_a_second_use_names_the_next_step(
    visitor: Visitor, fleet: RunningFleet
) -> None:
    link = fleet.new_link(OperatorRole.VIEWER)
    page = visitor.page
    page.goto(link)
    page.get_by_role("button", name="Sign in").click()
    assert page.url == f"{fleet.url}/"
    (cookie,) = visitor.context.cookies()
    assert cookie.get("httpOnly")
    assert cookie.get("sameSite") == "Strict"
    page.goto(link)
    page.get_by_role("button", name="Sign in").click()
    assert "was used" in page.inner_text("main")
    assert "fleet console" in page.inner_text("main")
    visitor.check(expected=["status of 40[34]"])


@pytest.mark.parametrize(("scheme", "width"), LOOKS)
def test_the_page_of_a_link_has_no_flaw(
    browser: Browser, fleet: RunningFleet, scheme: Scheme, width: int
) -> None:
    visitor = Visitor(browser, fleet.url, scheme=scheme, width=width)
    for path in (fleet.new_link(OperatorRole.VIEWER), "/sign-in"):
        visitor.page.goto(path)
        assert serious_flaws(visitor.page) == []
    visitor.check()
    visitor.close()
