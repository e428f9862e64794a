"""The playground's page, also without a script."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import unescape
from pathlib import Path

import pytest

from edge_agent.config import AgentConfig
from fleet.bundles.manifest import Bundle
from fleet.http_api.api_address import ApiAddress
from fleet.operator_api.operation import OperatorRole
from fleet.protocol.answer_trace import ReplyTrace, TraceEvent, TraceEventKind
from fleet.protocol.prompt import ErrorInfo, Reply
from fleet.protocol.report import DeviceStatus
from fleet.server.console.answer_picture import AnswerPicture, colours_of
from fleet.server.console.console_server import ConsoleServer
from fleet.server.console.playground import Playground
from fleet.server.operations.context import OperationContext
from tests.brokers import wait_until
from tests.fleet.conftest import add
from tests.fleet.operator_api.api_fleet import make_fleet
from tests.fleet.server.console.test_console_server import Browser, link_of
from tests.system.memory_fleet import DEVICE, memory_fleet

FORM = {"device": DEVICE, "mode": "verified", "prompt": "one two <b>three", "max_new_tokens": "12"}


@pytest.fixture(scope="module")
def console(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser that has signed in as an operator, at a fleet of one device and one worker."""
    home = make_fleet(tmp_path_factory.mktemp("playground") / "home")
    with memory_fleet() as fleet, home.registry("tests") as registry:
        fleet.start_worker(tiny_bundle)
        fleet.start_device(tiny_bundle, AgentConfig(num_threads=1, assist_deadline_ms=60_000))
        add(registry, DEVICE)
        status = DeviceStatus(online=True, epoch=1, bundle_id="b", version="1", mode="auto")
        registry.stats.record_status(DEVICE, status, 1000.0)
        for name, role in (("grace", OperatorRole.OPERATOR), ("vera", OperatorRole.VIEWER)):
            registry.operators.add(name, role)
        context = OperationContext(registry, home)
        with (
            Playground(fleet.connect("console-gateway")) as playground,
            ConsoleServer(ApiAddress("127.0.0.1", 0), context, None, [playground.routes]) as server,
        ):
            browser = Browser(server)
            browser.post("/sign-in", {"link": link_of(registry)})
            wait_until(
                lambda: "is offline" not in page(browser, "POST", FORM), "the device is online"
            )
            yield browser


def page(browser: Browser, method: str = "GET", form: dict[str, str] | None = None) -> str:
    if method == "GET":
        response = browser.request("GET", "/playground")
    else:
        response = browser.post("/playground", form)
    assert response.status == 200
    return str(response.text)  # type: ignore[attr-defined]


def test_the_page_lists_devices_that_are_online_and_has_no_inline_code(console: Browser) -> None:
    text = page(console)
    assert f'<option value="{DEVICE}">' in text
    assert 'type="module" src="/static/' in text
    assert "style=" not in text
    assert not re.search(r"<script(?![^>]* src=)", text)
    assert not re.search(r"\son\w+=", text)


def test_a_form_without_a_script_returns_the_whole_answer(console: Browser) -> None:
    text = page(console, "POST", FORM)
    tokens = re.findall(r'<span class="glass-token ([\w -]+)" title="([^"]*)">', text)
    assert 0 < len(tokens) <= 12
    assert all("by the cloud in round trip" in facts for _, facts in tokens)
    assert "<caption>Round trips</caption>" in text
    assert "<dt>Tokens</dt><dd>12</dd>" in text
    assert "<b>" not in text
    assert "one two &lt;b&gt;three" in text


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"device": "oven"}, "device oven is offline or unknown"),
        ({"device": "<i>/#"}, "<i>/#"),
        ({"prompt": " "}, "the prompt is empty"),
        ({"mode": "psychic"}, "mode"),
        ({"max_new_tokens": "many"}, "max_new_tokens"),
        ({"max_new_tokens": "0"}, "max_new_tokens"),
    ],
)
def test_a_form_that_is_not_usable_says_why(
    console: Browser, changes: dict[str, str], says: str
) -> None:
    text = page(console, "POST", FORM | changes)
    problem = re.search(r'role="alert">(.*?)</p>', text, re.DOTALL)
    assert problem
    assert says in unescape(problem[1])
    assert "<i>" not in text


def test_a_form_of_another_kind_or_site_is_refused(console: Browser) -> None:
    response = console.request(
        "POST", "/playground", None, Sec_Fetch_Site="same-origin", Content_Type="text/plain"
    )
    assert response.status == 400
    assert console.request("POST", "/playground", FORM, Sec_Fetch_Site="cross-site").status == 403


def test_a_viewer_has_no_playground(console: Browser) -> None:
    registry = console.server._context.registry
    viewer = Browser(console.server)
    viewer.post("/sign-in", {"link": link_of(registry, "vera")})
    assert viewer.request("GET", "/playground").status == 403
    assert viewer.post("/playground", FORM).status == 403
    stranger = Browser(console.server)
    assert stranger.request("GET", "/playground").status == 303


def test_the_picture_of_an_answer_that_failed() -> None:
    events = (TraceEvent(kind=TraceEventKind.VERIFY, at_ms=5, request=0, drafts=2),)
    trace = ReplyTrace(at_ms=9, logprob=-0.5, exit_layer=3, is_proposed=True, events=events)
    replies = [
        Reply(seq=0, text="a", token_id=1, source="exit:3", confidence=0.5, trace=trace),
        Reply(seq=1, text="b", token_id=1, source="x<y", trace=ReplyTrace(at_ms=9)),
        Reply(seq=2, done=True, error=ErrorInfo("deadline", "too late")),
    ]
    picture = AnswerPicture.of(replies)
    assert picture.tokens[0].facts == (
        "exit:3, confidence 50%, log-probability -0.500, copied from an earlier text"
    )
    classes = [token.classes for token in picture.tokens]
    assert classes == ["source-exit1 is-proposed", "source-exit0"]
    assert [(trip.ms, trip.dropped) for trip in picture.trips] == [(None, ())]
    assert picture.error


def test_exits_have_colours_by_depth() -> None:
    names = {"exit:24", "exit:9", "cloud", "exit:100", "exit:5", "exit:50"}
    assert colours_of(names) == {
        "exit:5": "source-exit0",
        "exit:9": "source-exit1",
        "exit:24": "source-exit2",
        "exit:50": "source-exit3",
        "exit:100": "source-exit0",
        "cloud": "source-cloud",
    }


def test_the_script_and_the_style_fit_the_page(console: Browser) -> None:
    folder = Path(__file__).parents[4] / "fleet/server/console/static"
    script = (folder / "playground.js").read_text()
    for sink in ("innerHTML", "insertAdjacentHTML", "eval(", "document.write", "outerHTML"):
        assert sink not in script
    addresses = re.findall(r'(?:src|href)="(/static/[^"]+)"', page(console))
    assert len(addresses) == 5
    for address in addresses:
        assert console.request("GET", address).status == 200
