"""Every action of the pages in a browser, and its trace in the audit log under the operator."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser

from fleet.operator_api.operation import OperatorRole
from fleet.protocol.access import Role
from fleet.registry.targets import Scope, Target
from tests.console.browser import Visitor, serious_flaws
from tests.console.running_fleet import RunningFleet


@pytest.fixture
def admin(browser: Browser, fleet: RunningFleet) -> Iterator[Visitor]:
    visitor = Visitor(browser, fleet.url)
    give_session(visitor, fleet, OperatorRole.ADMIN)
    yield visitor
    visitor.check()
    visitor.close()


def give_session(visitor: Visitor, fleet: RunningFleet, role: OperatorRole) -> None:
    for name, value in fleet.client_of(role).cookies.items():
        visitor.context.add_cookies([{"name": name, "value": value, "url": fleet.url}])


def press(visitor: Visitor, name: str, scope: str = "main") -> None:
    """Press a button by its name; wait for the page that follows."""
    with visitor.page.expect_navigation():
        visitor.page.locator(scope).get_by_role("button", name=name, exact=True).first.click()


def actions_of(fleet: RunningFleet, subject: str) -> list[str]:
    """Return what the admin of the console did to a subject, the oldest first."""
    changes = fleet.registry.audit_log.entries(subject=subject)
    return [row.action for row in changes if row.actor == OperatorRole.ADMIN][::-1]


def test_a_device_is_suspended_resumed_and_revoked(admin: Visitor, fleet: RunningFleet) -> None:
    fleet.home.enroll("spare", Role.DEVICE, fleet.folder / "spare")
    admin.page.goto("/devices/spare")
    press(admin, "Suspend")
    assert "suspended" in admin.page.inner_text("main")
    press(admin, "Resume")
    admin.page.get_by_text("Revoke for good").click()
    press(admin, "Revoke spare")
    assert fleet.registry.identities.get("spare").state == "revoked"
    assert actions_of(fleet, "spare") == ["suspend", "resume", "revoke"]
    assert serious_flaws(admin.page) == []


def test_a_roll_out_is_paused_and_resumed(admin: Visitor, fleet: RunningFleet) -> None:
    admin.page.goto("/rollouts/1")
    press(admin, "Pause")
    assert "paused" in admin.page.inner_text("main")
    press(admin, "Resume")
    assert fleet.registry.rollouts.latest()[0].state not in ("paused", "rolled_back")


def test_an_operator_is_added_gets_a_link_another_role_and_is_removed(
    admin: Visitor, fleet: RunningFleet
) -> None:
    page = admin.page
    page.goto("/operators")
    page.get_by_label("Name").fill("grace")
    press(admin, "Add")
    link = page.locator("pre.command").inner_text()
    assert link.startswith(f"{fleet.url}/sign-in?link=")
    row = page.get_by_role("row").filter(has=page.get_by_role("rowheader", name="grace"))
    row.get_by_role("combobox").select_option("operator")
    with page.expect_navigation():
        row.get_by_role("button", name="Change").click()
    assert row.get_by_role("combobox").input_value() == "operator"
    with page.expect_navigation():
        row.get_by_role("button", name="Make a link").click()
    assert page.locator("pre.command").inner_text() != link
    with page.expect_navigation():
        row.get_by_role("button", name="Remove").click()
    assert row.count() == 0


def test_a_device_is_enrolled_with_a_line_to_paste_and_a_picture_of_it(
    admin: Visitor, fleet: RunningFleet
) -> None:
    page = admin.page
    page.goto("/enrolment")
    page.get_by_label("Name").fill("garage")
    press(admin, "Make a token")
    assert "edge-agent join" in page.locator("pre.command").inner_text()
    assert page.locator("main svg").count()
    assert serious_flaws(page) == []
    assert fleet.registry.identities.get("garage").state == "pending"


def test_of_two_operators_who_change_one_setting_the_second_learns_of_the_first(
    admin: Visitor, browser: Browser, fleet: RunningFleet
) -> None:
    other = Visitor(browser, fleet.url)
    give_session(other, fleet, OperatorRole.OPERATOR)
    for visitor in (admin, other):
        visitor.page.goto("/settings?target=device:kitchen")
        visitor.page.locator("select[name=name]").select_option("top_k")
    admin.page.get_by_label("Value").fill("3")
    press(admin, "Set")
    other.page.get_by_label("Value").fill("4")
    press(other, "Set")
    assert "another operator has changed them" in other.page.get_by_role("alert").inner_text()
    assert other.page.get_by_label("Value").input_value() == "4"
    settings = fleet.registry.desired_state.settings(Target(Scope.DEVICE, "kitchen"))
    assert settings.top_k == 3
    press(other, "Set")  # after a look at the new state, which the page shows
    assert fleet.registry.desired_state.settings(Target(Scope.DEVICE, "kitchen")).top_k == 4
    other.check(expected=["status of 400"])
    other.close()


def test_a_session_that_ends_in_mid_page_leads_to_the_sign_in_and_changes_nothing(
    admin: Visitor, fleet: RunningFleet
) -> None:
    admin.page.goto("/rollouts/1")
    (cookie,) = admin.context.cookies()
    fleet.registry.operators.sign_out(cookie.get("value", ""))
    press(admin, "Pause")
    assert admin.page.url == f"{fleet.url}/sign-in"
    assert "fleet console" in admin.page.inner_text("main")
    assert fleet.registry.rollouts.latest()[0].state != "paused"


def test_a_registry_that_is_away_is_said_on_the_page_and_found_again(
    admin: Visitor, fleet: RunningFleet
) -> None:
    file = fleet.home.folder / "registry.sqlite"
    admin.page.goto("/devices")
    away = file.with_suffix(".away")
    file.rename(away)
    try:
        response = admin.page.goto("/workers")
        assert response is not None
        assert response.status == 503
        assert "load this page again" in admin.page.inner_text("main")
        assert serious_flaws(admin.page) == []
    finally:
        away.rename(file)
    assert admin.page.goto("/workers")
    assert fleet.url in admin.page.url
    admin.check(expected=["status of 503"])


def test_signing_out_ends_the_session(admin: Visitor, fleet: RunningFleet) -> None:
    admin.page.goto("/")
    press(admin, "Sign out", "header")
    assert admin.page.url == f"{fleet.url}/sign-in"
    admin.page.goto("/devices")
    assert admin.page.url == f"{fleet.url}/sign-in"
