"""Every form of the pages in a browser; a new form needs a walk here."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Locator, Page

from fleet.operator_api.operation import OperatorRole
from fleet.protocol.access import Role
from fleet.registry.rollouts.plan import RolloutPlan
from fleet.registry.targets import Scope, Target
from fleet.server.console.rendering import ENVIRONMENT
from tests.console.browser import Visitor, serious_flaws
from tests.console.running_fleet import CELLAR, KITCHEN, RunningFleet

FORM: Final = re.compile(r"<form\b([^>]*)>")
SPARE_BUNDLE: Final = "5" * 32
Walk = Callable[[Visitor, RunningFleet], None]


class FormWalk(NamedTuple):
    """A function that sends forms, each named by its method and its address."""

    name: str
    forms: tuple[str, ...]
    run: Walk
    scripts: bool


WALKS: Final[list[FormWalk]] = []


def walk(*forms: str, scripts: bool = True) -> Callable[[Walk], Walk]:
    """Register a function as the walk of some forms; `*` stands for a name in an address."""

    def register(function: Walk) -> Walk:
        WALKS.append(FormWalk(function.__name__, forms, function, scripts))
        return function

    return register


@pytest.fixture
def admin(browser: Browser, fleet: RunningFleet) -> Iterator[Visitor]:
    visitor = visitor_of(browser, fleet)
    yield visitor
    visitor.check()
    visitor.close()


def visitor_of(
    browser: Browser,
    fleet: RunningFleet,
    role: OperatorRole = OperatorRole.ADMIN,
    *,
    scripts: bool = True,
) -> Visitor:
    """Return the window of an operator who has signed in."""
    visitor = Visitor(browser, fleet.url, scripts=scripts)
    for name, value in fleet.client_of(role).cookies.items():
        visitor.context.add_cookies([{"name": name, "value": value, "url": fleet.url}])
    return visitor


def press(visitor: Visitor, name: str, scope: Locator | None = None) -> None:
    """Press a button by its name; wait for the page that follows."""
    place = scope or visitor.page.locator("main")
    with visitor.page.expect_navigation():
        place.get_by_role("button", name=name, exact=True).first.click()


def text_box(page: Page, label: str) -> Locator:
    return page.get_by_role("textbox", name=label)


def row_of(visitor: Visitor, name: str) -> Locator:
    """Return the row of a table whose header has a name."""
    page = visitor.page
    return page.get_by_role("row").filter(has=page.get_by_role("rowheader", name=name))


def actions_of(fleet: RunningFleet, subject: str) -> list[str]:
    """Return what the admin of the console did to a subject, the oldest first."""
    changes = fleet.registry.audit_log.entries(subject=subject)
    return [row.action for row in changes if row.actor == OperatorRole.ADMIN][::-1]


def open_rollout(fleet: RunningFleet) -> int:
    """Return the id of the roll-out under way; start one if the last one has ended."""
    newest = fleet.registry.rollouts.latest()[0]
    if newest.ended_at is None:
        return newest.id
    return fleet.registry.rollouts.start(fleet.next_bundle_id, RolloutPlan(canary_group="roof"))


def forms_of_templates() -> set[str]:
    """Return the method and the address of every form, with `*` for each value."""
    loader = ENVIRONMENT.loader
    assert loader is not None
    found = set()
    for name in loader.list_templates():
        source, _, _ = loader.get_source(ENVIRONMENT, name)
        for match in FORM.finditer(source):
            values = dict(re.findall(r'(\w+)="([^"]*)"', match[1]))
            address = re.sub(r"\{\{.*?\}\}", "*", values["action"])
            found.add(f"{values.get('method', 'get')} {address}")
    return found


def is_sent(visitor: Visitor, form: str) -> bool:
    """Whether the browser has sent a form."""
    method, address = form.split()
    pattern = re.escape(address).replace(r"\*", "[^/]+")
    return any(
        request.method == method.upper() and re.fullmatch(pattern, urlsplit(request.url).path)
        for request in visitor.requests
        if method == "post" or urlsplit(request.url).query
    )


def test_every_form_has_a_walk() -> None:
    assert {form for each in WALKS for form in each.forms} == forms_of_templates()


@walk("post /devices/*/suspend", "post /devices/*/resume", "post /devices/*/revoke")
def suspend_resume_and_revoke_a_device(admin: Visitor, fleet: RunningFleet) -> None:
    fleet.home.enroll("spare", Role.DEVICE, fleet.folder / "spare")
    admin.page.goto("/devices/spare")
    press(admin, "Suspend")
    assert "suspended" in admin.page.inner_text("main")
    press(admin, "Resume")
    assert not admin.page.get_by_role("button", name="Revoke spare").is_visible()
    admin.page.get_by_text("Revoke for good").click()
    press(admin, "Revoke spare")
    assert fleet.registry.identities.get("spare").state == "revoked"
    assert actions_of(fleet, "spare") == ["suspend", "resume", "revoke"]


@walk("post /devices/*/group", "post /devices/*/tags")
def move_and_tag_a_device(admin: Visitor, fleet: RunningFleet) -> None:
    page = admin.page
    page.goto(f"/devices/{CELLAR}")
    text_box(page, "Group, or empty").fill("basement")
    press(admin, "Move")
    assert "new group" in page.inner_text("main")
    text_box(page, "Tags").fill("floor=-1 damp=yes")
    press(admin, "Store tags")
    assert "value of a tag '-1'" in page.get_by_role("alert").inner_text()
    assert text_box(page, "Tags").input_value() == "floor=-1 damp=yes"
    text_box(page, "Tags").fill("floor=b1 damp=yes")
    press(admin, "Store tags")
    row = fleet.registry.stats.device(CELLAR)
    assert (row.group, row.tags) == ("basement", {"floor": "b1", "damp": "yes"})
    admin.check(expected=["status of 400"])


@walk("post /rollouts/*/pause", "post /rollouts/*/resume")
def pause_and_resume_a_roll_out(admin: Visitor, fleet: RunningFleet) -> None:
    number = open_rollout(fleet)
    admin.page.goto(f"/rollouts/{number}")
    press(admin, "Pause")
    assert "paused" in admin.page.inner_text("main")
    press(admin, "Resume")
    assert fleet.registry.rollouts.get(number).state in ("waiting", "running")


@walk("post /rollouts/*/roll-back", "post /rollouts")
def roll_back_and_start_a_roll_out(admin: Visitor, fleet: RunningFleet) -> None:
    page = admin.page
    number = open_rollout(fleet)
    page.goto(f"/rollouts/{number}")
    page.get_by_text("Roll back", exact=True).click()
    press(admin, f"Roll back {number}")
    assert "goes back" in page.inner_text("main")
    assert fleet.registry.rollouts.get(number).state == "undone"
    page.goto("/rollouts")
    page.get_by_role("link", name="Start a roll-out").click()
    page.get_by_role("combobox", name="Bundle").select_option(fleet.next_bundle_id)
    text_box(page, "Group of the first stage").fill("roof")
    text_box(page, "Percentages").fill("50,10")
    press(admin, "Start")
    assert "growing percentages" in page.get_by_role("alert").inner_text()
    text_box(page, "Percentages").fill("50, 100")
    page.get_by_text("Limits and times").click()
    text_box(page, "Largest share of devices that fail").fill("0.5")
    press(admin, "Start")
    started = fleet.registry.rollouts.latest()[0]
    assert page.url == f"{fleet.url}/rollouts/{started.id}?notice=started"
    assert (started.bundle_id, started.num_stages) == (fleet.next_bundle_id, 3)
    admin.check(expected=["status of 400"])


@walk("post /bundles/*/name", "post /bundles/*/remove")
def rename_and_remove_a_bundle(admin: Visitor, fleet: RunningFleet) -> None:
    fleet.registry.rollouts.add_bundle(SPARE_BUNDLE, "tiny", 1)
    admin.page.goto("/bundles")
    row = row_of(admin, SPARE_BUNDLE[:8])
    row.get_by_text("Rename").first.click()
    row.get_by_label(f"Name of {SPARE_BUNDLE[:8]}").fill("Summer")
    press(admin, "Rename", row)
    row = row_of(admin, "Summer")
    row.get_by_text("Remove", exact=True).click()
    press(admin, f"Remove {SPARE_BUNDLE[:8]}", row)
    assert SPARE_BUNDLE not in {each.bundle_id for each in fleet.registry.rollouts.bundles()}


@walk(
    "post /operators",
    "post /operators/*/role",
    "post /operators/*/link",
    "post /operators/*/remove",
)
def add_change_and_remove_an_operator(admin: Visitor, fleet: RunningFleet) -> None:
    page = admin.page
    page.goto("/operators")
    text_box(page, "Name").fill("grace")
    press(admin, "Add")
    link = page.locator("pre.command").inner_text()
    assert link.startswith(f"{fleet.url}/sign-in?link=")
    row = row_of(admin, "grace")
    row.get_by_role("combobox").select_option("operator")
    press(admin, "Change", row)
    assert row.get_by_role("combobox").input_value() == "operator"
    press(admin, "Make a link", row)
    assert page.locator("pre.command").inner_text() != link
    assert not row.get_by_role("button", name="Remove grace").is_visible()
    row.get_by_text("Remove", exact=True).click()
    press(admin, "Remove grace", row)
    assert row.count() == 0


@walk("post /enrolment")
def enrol_a_device_with_a_line_to_paste_and_a_picture_of_it(
    admin: Visitor, fleet: RunningFleet
) -> None:
    page = admin.page
    page.goto("/enrolment")
    text_box(page, "Name").fill("garage")
    press(admin, "Make a token")
    assert "edge-agent join" in page.locator("pre.command").inner_text()
    assert page.locator("main svg").count()
    assert fleet.registry.identities.get("garage").state == "pending"


@walk("post /settings", "get /settings")
def set_and_remove_a_setting(admin: Visitor, fleet: RunningFleet) -> None:
    page = admin.page
    page.goto("/settings")
    text_box(page, "Target").fill(f"device:{CELLAR}")
    press(admin, "Show")
    page.get_by_role("combobox", name="Setting").select_option("max_draft")
    text_box(page, "Value").fill("3")
    press(admin, "Set")
    target = Target(Scope.DEVICE, CELLAR)
    assert fleet.registry.desired_state.settings(target).max_draft == 3
    page.get_by_role("combobox", name="Setting").select_option("max_draft")
    press(admin, "Remove, so that a wider scope decides")
    assert fleet.registry.desired_state.settings(target).max_draft is None


@walk("get /devices", "get /sessions", "get /audit", "get /identities")
def filter_the_lists(admin: Visitor, fleet: RunningFleet) -> None:
    page = admin.page
    for path, label, value, there, not_there in (
        ("/devices", "Name", "kitch", KITCHEN, CELLAR),
        ("/sessions", "Device", KITCHEN, KITCHEN, CELLAR),
        ("/audit", "Subject", "no-such-thing", "No changes match", KITCHEN),
    ):
        page.goto(path)
        text_box(page, label).fill(value)
        press(admin, "Show")
        text = page.inner_text("main")
        assert there in text, path
        assert not_there not in text, path
        assert text_box(page, label).input_value() == value
    page.goto("/identities")
    page.get_by_role("combobox", name="Role").select_option("worker")
    press(admin, "Show")
    assert KITCHEN not in page.inner_text("main")


@walk("post /sign-in", "post /sign-out")
def sign_out_and_in(admin: Visitor, fleet: RunningFleet) -> None:
    page = admin.page
    page.goto("/")
    press(admin, "Sign out", page.locator("header"))
    assert page.url == f"{fleet.url}/sign-in"
    page.goto("/devices")
    assert page.url == f"{fleet.url}/sign-in"
    page.goto(fleet.new_link(OperatorRole.ADMIN))
    press(admin, "Sign in")
    assert page.url == f"{fleet.url}/devices"


@walk("post /playground", scripts=False)
def prompt_a_device_without_a_script(admin: Visitor, fleet: RunningFleet) -> None:
    page = admin.page
    page.goto(f"/playground?device={KITCHEN}")
    text_box(page, "Prompt").fill("How warm is it?")
    press(admin, "Send")
    assert page.locator(".glass-text .glass-token").count()


@pytest.mark.parametrize("each", WALKS, ids=[each.name for each in WALKS])
def test_forms_are_sent_in_a_browser(each: FormWalk, browser: Browser, fleet: RunningFleet) -> None:
    visitor = visitor_of(browser, fleet, scripts=each.scripts)
    each.run(visitor, fleet)
    assert [form for form in each.forms if not is_sent(visitor, form)] == []
    if each.scripts:
        assert serious_flaws(visitor.page) == []
    visitor.check()
    visitor.close()


def test_of_two_operators_who_change_one_setting_the_second_learns_of_the_first(
    admin: Visitor, browser: Browser, fleet: RunningFleet
) -> None:
    other = visitor_of(browser, fleet, OperatorRole.OPERATOR)
    for visitor in (admin, other):
        visitor.page.goto("/settings?target=device:kitchen")
        visitor.page.locator("select[name=name]").select_option("top_k")
    text_box(admin.page, "Value").fill("3")
    press(admin, "Set")
    text_box(other.page, "Value").fill("4")
    press(other, "Set")
    assert "another operator has changed them" in other.page.get_by_role("alert").inner_text()
    assert text_box(other.page, "Value").input_value() == "4"
    settings = fleet.registry.desired_state.settings(Target(Scope.DEVICE, "kitchen"))
    assert settings.top_k == 3
    press(other, "Set")  # after a look at the new state, which the page shows
    assert fleet.registry.desired_state.settings(Target(Scope.DEVICE, "kitchen")).top_k == 4
    other.check(expected=["status of 400"])
    other.close()


def test_a_session_that_ends_in_mid_page_leads_to_the_sign_in_and_back(
    admin: Visitor, fleet: RunningFleet
) -> None:
    page = admin.page
    number = open_rollout(fleet)
    page.goto(f"/rollouts/{number}")
    (cookie,) = admin.context.cookies()
    fleet.registry.operators.sign_out(cookie.get("value", ""))
    press(admin, "Pause")
    assert page.url == f"{fleet.url}/sign-in?unsaved=1"
    assert "your last change was not made" in page.inner_text("main")
    assert "fleet console" in page.inner_text("main")
    assert fleet.registry.rollouts.get(number).state != "paused"
    page.goto(fleet.new_link(OperatorRole.ADMIN))
    press(admin, "Sign in")
    assert page.url == f"{fleet.url}/rollouts/{number}"


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
        assert str(file.parent) not in admin.page.content()
        assert serious_flaws(admin.page) == []
    finally:
        away.rename(file)
    assert admin.page.goto("/workers")
    assert fleet.url in admin.page.url
    admin.check(expected=["status of 503"])
