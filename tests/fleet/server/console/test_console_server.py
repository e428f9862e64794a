"""The console's web server: sign-in, sessions, keys, and requests of other sites."""

from __future__ import annotations

import http.client
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode

import pytest

from fleet.errors import ConfigError
from fleet.http_api.api_address import ApiAddress
from fleet.operator_api.device_operations import LIST_DEVICES, DeviceQuery
from fleet.operator_api.operation import OperatorRole
from fleet.operator_api.remote_access import RemoteAccess
from fleet.registry.store import Registry
from fleet.server.console.console_server import ConsoleServer
from fleet.server.console.security_headers import HEADERS
from fleet.server.operations.context import OperationContext
from tests.fleet.operator_api.api_fleet import make_fleet

WAIT_S = 60.0


class Browser:
    """A client that keeps cookies, follows no redirects, and sends what a page would."""

    def __init__(self, server: ConsoleServer) -> None:
        self.server = server
        self.cookie: str | None = None

    def request(
        self, method: str, path: str, form: dict[str, str] | None = None, **headers: str
    ) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=WAIT_S)
        sent = {key.replace("_", "-"): value for key, value in headers.items()}
        if self.cookie:
            sent["Cookie"] = self.cookie
        body = None
        if form is not None:
            body = urlencode(form)
            sent.setdefault("Content-Type", "application/x-www-form-urlencoded")
        connection.request(method, path, body, sent)
        response = connection.getresponse()
        response.text = response.read().decode()  # type: ignore[attr-defined]
        connection.close()
        if cookie := response.headers.get("Set-Cookie"):
            self.cookie = cookie.partition(";")[0]
        return response

    def post(
        self, path: str, form: dict[str, str] | None = None, **headers: str
    ) -> http.client.HTTPResponse:
        return self.request("POST", path, form or {}, Sec_Fetch_Site="same-origin", **headers)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    home = make_fleet(tmp_path_factory.mktemp("fleet") / "home")
    with home.registry("tests") as registry:
        registry.operators.add("grace", OperatorRole.ADMIN)
        yield registry


@pytest.fixture(scope="module")
def server(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ConsoleServer]:
    home = make_fleet(tmp_path_factory.mktemp("other") / "home")
    context = OperationContext(registry, home)
    with ConsoleServer(ApiAddress("127.0.0.1", 0), context, None) as server:
        yield server


def link_of(registry: Registry, name: str = "grace") -> str:
    return str(registry.operators.make_link(name).secret)


@pytest.fixture
def browser(server: ConsoleServer) -> Browser:
    return Browser(server)


@pytest.fixture
def signed_in(browser: Browser, registry: Registry) -> Browser:
    assert browser.post("/sign-in", {"link": link_of(registry)}).status == 303
    return browser


def test_a_link_that_is_looked_at_signs_in_later_and_once(
    browser: Browser, registry: Registry
) -> None:
    link = link_of(registry)
    for _ in range(2):
        page = browser.request("GET", f"/sign-in?link={link}")
        assert page.status == 200
        assert "Sign in" in page.text  # type: ignore[attr-defined]
        assert browser.cookie is None
    answer = browser.post("/sign-in", {"link": link})
    assert (answer.status, answer.headers["Location"]) == (303, "/")
    cookie = answer.headers["Set-Cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    again = Browser(browser.server).post("/sign-in", {"link": link})
    assert again.status == 403
    assert "was used" in again.text  # type: ignore[attr-defined]
    assert "fleet console" in again.text  # type: ignore[attr-defined]


@pytest.mark.parametrize("link", ["", "x", "<script>", "0" * 16 + "-" + "0" * 64])
def test_a_link_that_is_none_is_refused_with_the_next_step(browser: Browser, link: str) -> None:
    answer = browser.post("/sign-in", {"link": link})
    assert answer.status == 403
    assert "<script>" not in answer.text  # type: ignore[attr-defined]
    assert browser.cookie is None


def test_a_session_uses_the_api_until_it_is_signed_out(signed_in: Browser) -> None:
    path = "/v1/fleet/devices"
    assert signed_in.request("GET", path).status == 200
    stolen = signed_in.cookie
    out = signed_in.post("/sign-out")
    assert (out.status, out.headers["Location"]) == (303, "/sign-in")
    signed_in.cookie = stolen
    answer = signed_in.request("GET", path)
    assert answer.status == 401
    assert '"bad_credentials"' in answer.text  # type: ignore[attr-defined]


def test_without_a_session_a_page_leads_to_the_sign_in_and_the_api_refuses(
    browser: Browser,
) -> None:
    page = browser.request("GET", "/devices")
    assert (page.status, page.headers["Location"]) == (303, "/sign-in")
    assert browser.request("GET", "/v1/fleet/devices").status == 401
    assert browser.request("GET", "/healthz").status == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
        {"Sec_Fetch_Site": "none"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://["},
        {"Sec_Fetch_Site": "cross-site", "Origin": "http://127.0.0.1"},
    ],
)
def test_a_change_from_another_site_is_refused(signed_in: Browser, headers: dict[str, str]) -> None:
    answer = signed_in.request("POST", "/v1/fleet/operators", {"name": "eve"}, **headers)
    assert answer.status == 403
    assert signed_in.request("POST", "/sign-in", {"link": "x"}, **headers).status == 403
    assert signed_in.request("GET", "/v1/fleet/devices").status == 200


def test_a_page_of_the_console_may_change_things_by_its_origin(
    signed_in: Browser, server: ConsoleServer
) -> None:
    origin = f"http://127.0.0.1:{server.port}"
    assert signed_in.request("POST", "/sign-out", {}, Origin=origin).status == 303


def test_a_key_uses_the_api_alone_and_needs_no_origin(
    server: ConsoleServer, registry: Registry, browser: Browser
) -> None:
    key = str(registry.operators.create_key("grace", None).secret)
    with RemoteAccess(server.url, key) as access:
        assert access.call(LIST_DEVICES, DeviceQuery()).total
    page = browser.request("GET", "/devices", Authorization=f"Bearer {key}")
    assert page.status == 303
    wrong = browser.request("GET", "/v1/fleet/devices", Authorization="Bearer nonsense")
    assert wrong.status == 401


def test_every_response_has_the_headers_that_protect_pages(signed_in: Browser) -> None:
    for path in ("/sign-in", "/no-such-page", "/v1/fleet/devices", "/v1/fleet/nothing", "/healthz"):
        response = signed_in.request("GET", path)
        assert {name: response.headers[name] for name in HEADERS} == HEADERS, path
        assert response.headers["Cache-Control"] == "no-store"
    assert "unsafe" not in HEADERS["Content-Security-Policy"]


def test_static_files_are_kept_for_good_under_an_address_with_their_hash(
    browser: Browser,
) -> None:
    page = browser.request("GET", "/sign-in").text  # type: ignore[attr-defined]
    (address,) = re.findall(r'href="(/static/[^"]+css)"', page)
    style = browser.request("GET", address)
    assert (style.status, style.headers["Content-Type"]) == (200, "text/css; charset=utf-8")
    assert "immutable" in style.headers["Cache-Control"]
    for path in ("/static/0/console.css", "/static/../__init__.py", "/static/%2e%2e/__init__.py"):
        assert browser.request("GET", path).status in (303, 404)


def test_bytes_that_are_no_request_end_the_connection(server: ConsoleServer) -> None:
    with socket.create_connection(("127.0.0.1", server.port), WAIT_S) as connection:
        connection.sendall(b"\x16\x03\x01 nonsense\r\n\r\n")
        received = connection.recv(4096)
        assert received.startswith(b"HTTP/1.") or not received
    assert Browser(server).request("GET", "/healthz").status == 200


def test_an_address_that_guesses_links_has_to_wait(registry: Registry, tmp_path: Path) -> None:
    home = make_fleet(tmp_path / "home")
    with ConsoleServer(
        ApiAddress("127.0.0.1", 0), OperationContext(registry, home), None
    ) as server:
        statuses = [Browser(server).post("/sign-in", {"link": "x"}).status for _ in range(25)]
    assert statuses[0] == 403
    assert statuses[-1] == 429


def test_an_address_that_is_taken_is_an_error_with_the_option(
    server: ConsoleServer, registry: Registry, tmp_path: Path
) -> None:
    home = make_fleet(tmp_path / "home")
    second = ConsoleServer(
        ApiAddress("127.0.0.1", server.port), OperationContext(registry, home), None
    )
    with pytest.raises(ConfigError, match=r"console cannot listen.*--console"), second:
        pass
