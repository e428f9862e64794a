"""Forms of the pages: changes of roll-outs, bundles and devices, and what is refused there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fleet.operator_api.operation import OperatorRole
from fleet.registry.results import RolloutRow
from fleet.registry.rollouts.plan import RolloutPlan
from fleet.registry.rollouts.states import RolloutState
from fleet.server.console.pages.rollout_pages import plan_of
from fleet.server.home import FleetHome
from tests.fleet.operator_api.api_fleet import BUNDLE, SPARE_BUNDLE, copy_of, make_fleet
from tests.fleet.server.console.html_page import HtmlPage
from tests.fleet.server.console.test_pages import Console, serving


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> FleetHome:
    return make_fleet(tmp_path_factory.mktemp("template") / "home")


@pytest.fixture
def console(template: FleetHome, tmp_path: Path) -> Iterator[Console]:
    yield from serving(copy_of(template, tmp_path / "home"))


def send(console: Console, path: str, status: int = 303, **fields: str) -> HtmlPage | None:
    """Send a form as an admin; return the page, unless the response leads to another one."""
    answer = console.browser().post(path, fields)
    assert answer.status == status, answer.text  # type: ignore[attr-defined]
    if status == 303:
        return None
    page = HtmlPage(answer.text)  # type: ignore[attr-defined]
    assert page.problems == []
    return page


def latest(console: Console) -> RolloutRow:
    return console.registry.rollouts.latest()[0]


def test_a_roll_out_is_started_with_the_plan_of_the_form(console: Console) -> None:
    form = {"group": "house", "canary": "2", "canary_group": "house", "percentages": "50, 100"}
    limits = {"max_failed": "0.2", "min_answers": "7"}
    send(console, "/rollouts", 303, bundle=SPARE_BUNDLE, **form, **limits)
    row = latest(console)
    assert (row.bundle_id, row.group, row.num_stages) == (SPARE_BUNDLE, "house", 3)
    (entry,) = console.registry.audit_log.entries(action="rollout", limit=1)
    assert entry.actor == "of-admin"
    plan = entry.details["plan"]
    assert (plan["canary"], plan["max_failed"], plan["limits"]["min_answers"]) == (2, 0.2, 7)
    assert "The roll-out is started" in console.page(f"/rollouts/{row.id}?notice=started").text


def test_the_form_of_a_roll_out_has_the_defaults_and_the_chosen_bundle(console: Console) -> None:
    page = console.page(f"/rollouts/new?bundle={SPARE_BUNDLE}")
    assert f'<option value="{SPARE_BUNDLE}" selected>' in page.source
    assert 'name="percentages" value="10, 50, 100"' in page.source
    assert plan_of({"group": "", "percentages": " ", "bundle": "x"}) == RolloutPlan()


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("bundle", "ffff", "unknown bundle"),
        ("bundle", "<script>", "unknown bundle"),
        ("group", "lab", "over the same devices"),
        ("group", "nowhere", "no active device"),
        ("canary", "none", "canary"),
        ("canary", "0", "canary"),
        ("canary", "9" * 5000, "canary"),
        ("percentages", "10,x", "percentages"),
        ("percentages", "50,10,100", "growing percentages"),
        ("max_failed", "2", "max_failed"),
        ("max_failed", "nan", "max_failed"),
        ("observe_s", "1e99", "observe_s"),
        ("min_answers", "-1", "min_answers"),
    ],
)
def test_a_plan_that_is_not_usable_stays_in_the_form(
    console: Console, field: str, value: str, says: str
) -> None:
    form = {"bundle": SPARE_BUNDLE, "group": "house"} | {field: value}
    page = send(console, "/rollouts", 400, **form)
    assert page is not None
    assert says in page.text
    assert "<script>" not in page.source
    if field != "bundle":
        assert f'value="{value}"' in page.source
    assert latest(console).id == 1


def test_an_open_roll_out_is_rolled_back_and_says_its_reason_once(console: Console) -> None:
    number = console.registry.rollouts.start(SPARE_BUNDLE, RolloutPlan(group="house"))
    row = latest(console)
    assert row.reason == row.doing
    assert console.page(f"/rollouts/{number}").text.count(row.doing) == 1
    send(console, f"/rollouts/{number}/roll-back")
    assert latest(console).state == RolloutState.UNDONE
    assert send(console, f"/rollouts/{number}/roll-back", 409)


def test_a_bundle_is_named_and_removed(console: Console) -> None:
    send(console, f"/bundles/{SPARE_BUNDLE}/name", name="Spare")
    assert "Spare" in console.page("/bundles").text
    assert "name &#39;a b&#39;" in send_bad_name(console).source
    page = send(console, f"/bundles/{BUNDLE}/remove", 400)
    assert page is not None
    assert "is not removed" in page.text
    send(console, "/bundles/Spare/remove")
    assert "Spare" not in console.page("/bundles").text


def send_bad_name(console: Console) -> HtmlPage:
    page = send(console, f"/bundles/{SPARE_BUNDLE}/name", 400, name="a b")
    assert page is not None
    return page


def test_a_device_gets_another_group_and_other_tags(console: Console) -> None:
    send(console, "/devices/kitchen/group", group="lab")
    assert console.registry.identities.get("kitchen").group == "lab"
    send(console, "/devices/kitchen/group", group=" ")
    assert console.registry.identities.get("kitchen").group is None
    console.registry.identities.tag("kitchen", {"added": "meanwhile"})
    send(console, "/devices/kitchen/tags", shown="floor=1", tags="room=left  wall=2")
    tags = console.registry.stats.device("kitchen").tags
    assert tags == {"added": "meanwhile", "room": "left", "wall": "2"}
    send(console, "/devices/kitchen/tags", shown="room=left", tags="room=left")


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/devices/kitchen/group", {"group": "a b"}),
        ("/devices/kitchen/group", {"group": "<script>"}),
        ("/devices/kitchen/tags", {"tags": "floor"}),
        ("/devices/kitchen/tags", {"tags": "floor=1 floor=2"}),
        ("/devices/kitchen/tags", {"tags": "<script>=1"}),
    ],
)
def test_a_wrong_group_or_tag_is_refused_on_the_page(
    console: Console, path: str, fields: dict[str, str]
) -> None:
    page = send(console, path, 400, **fields)
    assert page is not None
    assert 'role="alert"' in page.source
    assert "<script>" not in page.source


def test_forms_are_shown_to_those_who_may_send_them(console: Console) -> None:
    for path, text, least in (
        ("/rollouts", "Start a roll-out", OperatorRole.OPERATOR),
        ("/rollouts/1", "Roll back", OperatorRole.OPERATOR),
        ("/bundles", "Rename", OperatorRole.OPERATOR),
        ("/bundles", "Remove", OperatorRole.ADMIN),
        ("/devices/kitchen", "Store tags", OperatorRole.ADMIN),
        ("/devices/kitchen", "Move", OperatorRole.ADMIN),
    ):
        for role in OperatorRole:
            assert (text in console.page(path, role).text) == role.includes(least), (path, role)
    console.page("/rollouts/new", OperatorRole.VIEWER, 403)
