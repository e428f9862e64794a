"""The pages: what they show, to whom, and that nothing from outside gets into their HTML."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import reduce
from pathlib import Path

import pytest

from fleet.http_api.api_address import ApiAddress
from fleet.operator_api.device_operations import SHOW_DEVICE, DeviceWindow
from fleet.operator_api.operation import OperatorRole
from fleet.operator_api.settings_operations import SET_SETTINGS, SettingsChange
from fleet.operator_api.stats_operations import LIST_GROUP_STATS, StatsWindow
from fleet.protocol.modes import offload_rate
from fleet.protocol.report import ConfigProblem, DeviceStatus
from fleet.protocol.types import DAY_S, MAX_LABEL_LENGTH
from fleet.registry.store import Registry
from fleet.server.console.console_server import ConsoleServer
from fleet.server.console.formatting import percent
from fleet.server.console.pages.page_routes import FORMS, PAGES, page_routes
from fleet.server.console.playground import Playground
from fleet.server.home import CONSOLE_GATEWAY, FleetConfig, FleetHome
from fleet.server.operations.context import OperationContext
from fleet.server.operations.local_access import LocalAccess
from fleet.transport.in_memory import InMemoryBroker
from tests.fleet.conftest import add
from tests.fleet.operator_api.api_fleet import BUNDLE, SPARE_BUNDLE, copy_of, make_fleet
from tests.fleet.server.console.html_page import HtmlPage
from tests.fleet.server.console.test_console_server import Browser

ADDRESSES = [
    path.replace("{device}", "kitchen").replace(r"{rollout:\d{1,9}}", "1") for path in PAGES
]
HOSTILE = "<script>alert(1)</script>'\"><img src=x onerror=alert(2)>\u202e\x1b[31m"


class Console:
    """A console over a fleet, and a browser for an operator of each role."""

    def __init__(self, server: ConsoleServer, context: OperationContext) -> None:
        self.server = server
        self.context = context
        self.access = LocalAccess(context)
        self._browsers: dict[OperatorRole, Browser] = {}

    @property
    def registry(self) -> Registry:
        return self.context.registry

    def browser(self, role: OperatorRole = OperatorRole.ADMIN) -> Browser:
        if role not in self._browsers:
            self.registry.operators.add(f"of-{role}", role)
            link = str(self.registry.operators.make_link(f"of-{role}").secret)
            browser = Browser(self.server)
            assert browser.post("/sign-in", {"link": link}).status == 303
            self._browsers[role] = browser
        return self._browsers[role]

    def page(
        self, path: str, role: OperatorRole = OperatorRole.ADMIN, status: int = 200
    ) -> HtmlPage:
        response = self.browser(role).request("GET", path)
        assert response.status == status, path
        page = HtmlPage(response.text)  # type: ignore[attr-defined]
        assert page.problems == []
        return page


def serving(home: FleetHome) -> Iterator[Console]:
    with home.registry("tests") as registry:
        context = OperationContext(registry, home)
        with (
            InMemoryBroker().connect(CONSOLE_GATEWAY) as link,
            Playground(link) as playground,
            ConsoleServer(
                ApiAddress("127.0.0.1", 0), context, None, [page_routes, playground.routes]
            ) as server,
        ):
            yield Console(server, context)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> FleetHome:
    return make_fleet(tmp_path_factory.mktemp("template") / "home")


@pytest.fixture(scope="module")
def console(template: FleetHome, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Console]:
    yield from serving(copy_of(template, tmp_path_factory.mktemp("full") / "home"))


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Console]:
    folder = tmp_path_factory.mktemp("empty") / "home"
    yield from serving(
        FleetHome.create(folder, FleetConfig(host="127.0.0.1", port=1, bundle="/no/bundle"))
    )


@pytest.mark.parametrize("path", ADDRESSES)
def test_a_page_is_well_formed_with_everything_and_links_lead_to_pages(
    console: Console, path: str
) -> None:
    page = console.page(path)
    for link in {each.partition("?")[0].partition("#")[0] for each in page.links} - {""}:
        assert console.browser().request("GET", link).status == 200, link


@pytest.mark.parametrize("path", [path for path in PAGES if "{" not in path])
def test_a_page_is_well_formed_in_a_fleet_without_anything(empty: Console, path: str) -> None:
    empty.page(path)


def test_a_page_that_is_not_there_says_so(console: Console) -> None:
    assert "unknown device 'oven'" in console.page("/devices/oven", status=404).text
    assert "unknown roll-out 99" in console.page("/rollouts/99", status=404).text
    assert console.browser().post("/rollouts/99/pause").status == 404
    console.page("/nothing", status=404)


def test_a_device_has_the_values_of_its_operation(console: Console) -> None:
    now = time.time()
    window = DeviceWindow(device="kitchen", since=now - 86_400)
    details = console.access.call(SHOW_DEVICE, window)
    text = console.page("/devices/kitchen").text
    assert percent(details.stats.offload_rate) in text
    assert f"Answers, 24 h {details.stats.generations}" in text
    assert details.device.bundle_id in text
    for session in details.sessions:
        assert session.session[:8] in text


def test_the_overview_compares_the_day_with_the_week(console: Console) -> None:
    sources: dict[str, int] = {}
    rows = console.access.call(LIST_GROUP_STATS, StatsWindow(since=time.time() - 7 * DAY_S)).rows
    for row in rows:
        for source, tokens in row.sources.items():
            sources[source] = sources.get(source, 0) + tokens
    assert f"{percent(offload_rate(sources))} in 7 days" in console.page("/").text


def test_a_device_shows_the_bundle_that_it_does_not_serve_yet(
    template: FleetHome, tmp_path: Path
) -> None:
    for console in serving(copy_of(template, tmp_path / "home")):
        assert "not served yet" not in console.page("/devices/kitchen").text
        change = SettingsChange(target="device:kitchen", settings={"bundle": SPARE_BUNDLE})
        console.access.call(SET_SETTINGS, change)
        text = console.page("/devices/kitchen").text
        assert f"Bundle desired {SPARE_BUNDLE} not served yet" in text


def test_details_of_changes_are_texts_and_times(template: FleetHome, tmp_path: Path) -> None:
    for console in serving(copy_of(template, tmp_path / "home")):
        values = {"ends_at": 1_000.5, "names": ["a", "b"], "is_new": True, "note": HOSTILE}
        console.registry.audit_log.add("tested", "kitchen", **values)
        page = console.page("/audit?subject=kitchen&action=tested")
        assert "ends_at: 1970-01-01 00:16:40" in page.text
        assert "names: a, b" in page.text
        assert "is_new: true" in page.text
        assert "<script>alert" not in page.source


def test_devices_are_found_by_the_address(console: Console) -> None:
    text = console.page("/devices?search=itch&sort=-last_seen&status=online&group=house").text
    assert "kitchen" in text
    assert "attic" not in text
    assert "No device matches" in console.page("/devices?search=%3Cb%3E").text
    console.page("/devices?sort=nonsense&after=&status=")


@pytest.mark.parametrize("role", OperatorRole)
def test_actions_are_shown_and_done_by_role(
    template: FleetHome, tmp_path: Path, role: OperatorRole
) -> None:
    for console in serving(copy_of(template, tmp_path / "home")):
        text = console.page("/devices/kitchen", role).text
        assert ("Suspend" in text) == role.includes(OperatorRole.ADMIN)
        browser = console.browser(role)
        suspended = browser.post("/devices/kitchen/suspend")
        assert suspended.status == (303 if role.includes(OperatorRole.ADMIN) else 403)
        paused = browser.post("/rollouts/1/pause")
        assert paused.status == (303 if role.includes(OperatorRole.OPERATOR) else 403)
        assert browser.request("GET", "/operators").status == (
            200 if role.includes(OperatorRole.ADMIN) else 403
        )


def test_every_form_refuses_another_site(console: Console) -> None:
    values = {
        "{device}": "kitchen",
        r"{rollout:\d{1,9}}": "1",
        "{name}": "ada",
        "{bundle}": BUNDLE,
        "{change:name|remove}": "remove",
        "{change:suspend|resume|revoke|group|tags}": "revoke",
        "{change:pause|resume|roll-back}": "roll-back",
        "{change:link|remove|role}": "remove",
    }
    for path in FORMS:
        address = reduce(lambda text, each: text.replace(*each), values.items(), path)
        answer = console.browser().request("POST", address, {}, Sec_Fetch_Site="cross-site")
        assert answer.status == 403, address
    assert "revoked" not in console.page("/devices/kitchen").text


def test_a_setting_is_changed_once_for_a_version(template: FleetHome, tmp_path: Path) -> None:
    for console in serving(copy_of(template, tmp_path / "home")):
        form = {"target": "all", "name": "threshold", "value": "0.5", "version": "0"}
        assert console.browser().post("/settings", form).status == 303
        assert "0.5" in console.page("/settings?target=all").text
        late = console.browser().post("/settings", {**form, "value": "0.7"})
        page = HtmlPage(late.text)  # type: ignore[attr-defined]
        assert late.status == 400
        assert "version" in page.text
        assert 'value="0.7"' in page.source  # what was entered stays
        wrong = console.browser().post("/settings", {**form, "value": "7", "version": ""})
        assert wrong.status == 400
        removal = {"target": "all", "name": "threshold", "version": "", "remove": "1"}
        assert console.browser().post("/settings", removal).status == 303
        assert "No settings here" in console.page("/settings?target=all").text


@pytest.mark.parametrize(
    ("value", "version"),
    [
        ("[" * 20_000, "0"),
        ('"\\ud800"', "0"),
        ("1" * 6000, "0"),
        ("0.5", "9" * 50),
        ("0.5", "\u00b2"),
    ],
)
def test_a_hostile_value_or_version_is_refused_at_the_form(
    console: Console, value: str, version: str
) -> None:
    form = {"target": "all", "name": "threshold", "value": value, "version": version}
    answer = console.browser().post("/settings", form)
    page = HtmlPage(answer.text)  # type: ignore[attr-defined]
    assert answer.status == 400
    assert page.problems == []
    assert "expected" in page.text


@pytest.mark.parametrize(
    "kind",
    [
        "application/json",
        "multipart/form-data",
        "multipart/form-data; boundary=x",
        "text/plain; charset=nonsense",
    ],
)
def test_a_form_of_another_kind_is_refused(console: Console, kind: str) -> None:
    answer = console.browser().post("/settings", {"target": "all"}, Content_Type=kind)
    assert answer.status == 400
    assert "expected a form of a page" in answer.text  # type: ignore[attr-defined]


def test_a_form_with_too_much_is_refused(console: Console) -> None:
    fields = {f"field-{number}": "1" for number in range(101)}
    assert console.browser().post("/settings", fields).status == 400
    assert console.browser().post("/settings", {"value": "x" * 70_000}).status == 413


@pytest.mark.parametrize("after", ["1_" + "9" * 40, "1_-1", "1", "x_1"])
def test_a_page_of_sessions_that_does_not_exist_is_refused(console: Console, after: str) -> None:
    assert "next_page" in console.page(f"/sessions?after={after}", status=400).text


def test_the_settings_of_a_device_name_the_scope_that_decides(
    template: FleetHome, tmp_path: Path
) -> None:
    for console in serving(copy_of(template, tmp_path / "home")):
        for target, value in (("all", 0.4), ("group:house", 0.6)):
            change = SettingsChange(target=target, settings={"threshold": value})
            console.access.call(SET_SETTINGS, change)
        text = console.page("/settings?target=device:kitchen").text
        assert "threshold 0.6 group:house" in text


def test_a_new_device_has_a_line_to_paste_and_a_picture_of_it(
    template: FleetHome, tmp_path: Path
) -> None:
    for console in serving(copy_of(template, tmp_path / "home")):
        answer = console.browser().post("/enrolment", {"name": "tablet", "group": "house"})
        page = HtmlPage(answer.text)  # type: ignore[attr-defined]
        assert page.problems == []
        assert "edge-agent join" in page.text
        assert 'class="qr"' in page.source
        again = console.browser().post("/enrolment", {"name": "kitchen", "group": "house"})
        assert again.status == 400
        assert 'value="kitchen"' in again.text  # type: ignore[attr-defined]


def test_operators_are_added_changed_and_removed(template: FleetHome, tmp_path: Path) -> None:
    for console in serving(copy_of(template, tmp_path / "home")):
        browser = console.browser()
        added = browser.post("/operators", {"name": "eve", "role": "operator"})
        assert "/sign-in?link=" in added.text  # type: ignore[attr-defined]
        assert browser.post("/operators/eve/role", {"role": "viewer"}).status == 303
        assert {row.name: row.role for row in console.registry.operators.all()}["eve"] == "viewer"
        assert browser.post("/operators", {"name": "eve", "role": "admin"}).status == 400
        assert browser.post("/operators/eve/remove").status == 303
        assert "eve" not in {row.name for row in console.registry.operators.all()}


def test_texts_from_outside_are_escaped_and_cut(template: FleetHome, tmp_path: Path) -> None:
    for console in serving(copy_of(template, tmp_path / "home")):
        message = (HOSTILE + "x" * 10_000)[:MAX_LABEL_LENGTH]
        problem = ConfigProblem(code="bad_config", message=message, is_final=False)
        status = DeviceStatus(
            online=True,
            epoch=9,
            bundle_id=BUNDLE,
            version=HOSTILE,
            mode=HOSTILE,
            config_error=problem,
        )
        console.registry.stats.record_status("kitchen", status, time.time())
        console.registry.audit_log.add("tested", HOSTILE, value=HOSTILE)
        for path in ("/", "/devices", "/devices/kitchen", "/audit"):
            page = console.page(path)
            assert "<script>alert" not in page.source
            assert "<img" not in page.source
            assert "\x1b" not in page.source
            assert len(page.source) < 200_000


def test_a_page_of_ten_thousand_devices_is_small(template: FleetHome, tmp_path: Path) -> None:
    for console in serving(copy_of(template, tmp_path / "home")):
        for number in range(200):
            add(console.registry, f"device-with-a-rather-long-name-{number:05d}", group="many")
        page = console.page("/devices?group=many")
        assert len(page.source) < 200_000
        assert "Next page" in page.text
        (following,) = [link for link in page.links if "after=" in link]
        assert "00199" not in page.text
        assert "00050" in console.page(following).text
