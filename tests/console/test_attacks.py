"""Attacks on the console over HTTP: stolen secrets, other sites, hostile bytes, floods."""

from __future__ import annotations

import gzip
import json
import re
import socket
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import pytest

from fleet.operator_api.operation import OperatorRole
from tests.console.console_site import ConsoleSite, console_site
from tests.console.web_client import FORM, JSON, SAME_ORIGIN, WAIT_S

DEVICES: Final = "/v1/fleet/devices"
OPERATORS: Final = "/v1/fleet/operators"
EVE: Final = json.dumps({"name": "eve", "role": "admin"})
NUM_AT_ONCE: Final = 60
"""Below the 64 calls that the server has room for."""

HOSTILE_NAMES: Final = (
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(1)'>",
    "a\r\nSet-Cookie: fleet=1",
    "\u202egnp.exe",
    "\x00",
    "../../etc/passwd",
    "x" * 1_000_000,
)
NUM_GUESSES: Final = 60


@pytest.fixture
def guessed(tmp_path: Path) -> Iterator[ConsoleSite]:
    """A console whose address of the clients has sent many wrong links."""
    with console_site(tmp_path) as site:
        guesses = [site.visitor().post_form("/sign-in", link="x") for _ in range(NUM_GUESSES)]
        assert guesses[0].status == 403
        assert guesses[-1].status == 429
        yield site


def test_wrong_links_keep_out_none_of_those_who_have_the_same_address(guessed: ConsoleSite) -> None:
    assert guessed.admin.get(DEVICES).status == 200
    key = f"Bearer {guessed.new_key()}"
    assert guessed.visitor().get(DEVICES, Authorization=key).status == 200
    assert guessed.visitor().post_form("/sign-in", link=guessed.new_link()).status == 303
    assert guessed.visitor().get(DEVICES, Authorization="Bearer x").status == 429


def test_many_requests_of_one_session_at_once_are_no_attack(site: ConsoleSite) -> None:
    with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
        statuses = pool.map(lambda _: site.admin.get(DEVICES).status, range(NUM_AT_ONCE))
    assert set(statuses) == {200}


def test_of_several_who_use_one_link_at_once_one_is_signed_in(site: ConsoleSite) -> None:
    link = site.new_link()
    with ThreadPoolExecutor(8) as pool:
        statuses = Counter(
            pool.map(lambda _: site.visitor().post_form("/sign-in", link=link).status, range(8))
        )
    assert statuses == {303: 1, 403: 7}


def test_a_secret_of_one_kind_is_none_of_another(site: ConsoleSite) -> None:
    link, key = site.new_link(), site.new_key()
    ((cookie, session),) = site.sign_in(OperatorRole.ADMIN).cookies.items()
    assert site.visitor().get(DEVICES, Cookie=f"{cookie}={session}").status == 200
    for secret in (link, key):
        assert site.visitor().get(DEVICES, Cookie=f"{cookie}={secret}").status == 401
    for secret in (link, session):
        assert site.visitor().get(DEVICES, Authorization=f"Bearer {secret}").status == 401
    for secret in (session, key):
        assert site.visitor().post_form("/sign-in", link=secret).status == 403


def test_a_session_that_was_there_before_the_sign_in_is_not_taken_over(site: ConsoleSite) -> None:
    """An attacker may have set the cookie (session fixation)."""
    client = site.sign_in(OperatorRole.VIEWER)
    before = dict(client.cookies)
    assert client.post_form("/sign-in", link=site.new_link()).status == 303
    assert client.cookies.keys() == before.keys()
    assert client.cookies != before
    assert client.post_json(OPERATORS, {}).status == 400  # an admin's right
    client.cookies = before
    assert client.post_json(OPERATORS, {}).status == 403  # a viewer's still


@pytest.mark.parametrize("change", ["remove", "demote"])
def test_an_operator_who_is_removed_or_demoted_has_lost_the_rights_at_once(
    site: ConsoleSite, change: str
) -> None:
    site.registry.operators.add("mallory", OperatorRole.ADMIN)
    client = site.visitor()
    link = str(site.registry.operators.make_link("mallory").secret)
    client.post_form("/sign-in", link=link)
    spare = str(site.registry.operators.make_link("mallory").secret)
    key = {"Authorization": f"Bearer {site.registry.operators.create_key('mallory', None).secret}"}
    assert client.get(OPERATORS).status == 200
    if change == "remove":
        site.admin.send("DELETE", f"{OPERATORS}/mallory", headers=SAME_ORIGIN)
        assert client.get(DEVICES).status == 401
        assert site.visitor().get(DEVICES, **key).status == 401
        assert site.visitor().post_form("/sign-in", link=spare).status == 403
        return
    site.admin.post_json(f"{OPERATORS}/mallory/role", {"role": "viewer"}, "PUT")
    assert client.get(OPERATORS).status == 403
    assert site.visitor().get(OPERATORS, **key).status == 403
    site.registry.operators.remove("mallory")


@pytest.mark.parametrize(
    "headers",
    [
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {},
        {"Sec-Fetch-Site": "cross-site", "Authorization": "Basic ZXZlOmV2ZQ=="},
        {"Sec-Fetch-Site": "cross-site", "Authorization": "Negotiate x"},
        {"Sec-Fetch-Site": "cross-site", "Authorization": "Bearer x"},
        {"Sec-Fetch-Site": "cross-site", "X-HTTP-Method-Override": "GET"},
    ],
)
def test_another_site_changes_nothing_with_the_session_of_a_visitor(
    site: ConsoleSite, headers: dict[str, str]
) -> None:
    answer = site.admin.send("POST", OPERATORS, EVE, JSON | headers)
    assert answer.status in (401, 403)
    assert "eve" not in site.operators()


@pytest.mark.parametrize("kind", ["text/plain", "multipart/form-data", FORM["Content-Type"]])
def test_a_form_cannot_be_a_request_of_the_api(site: ConsoleSite, kind: str) -> None:
    answer = site.admin.send("POST", OPERATORS, EVE, {"Content-Type": kind} | SAME_ORIGIN)
    assert (answer.status, answer.error["code"]) == (400, "undecodable")


def test_no_other_site_may_read_a_response(site: ConsoleSite) -> None:
    for method in ("GET", "OPTIONS"):
        answer = site.admin.send(method, DEVICES, headers={"Origin": "https://evil.example"})
        assert not [name for name in answer.headers if name.startswith("Access-Control")]
        assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"


def test_consoles_on_two_ports_have_sessions_of_their_own(
    site: ConsoleSite, tmp_path: Path
) -> None:
    """A browser sends a cookie to every port of a host."""
    with console_site(tmp_path) as other:
        assert site.admin.cookies.keys().isdisjoint(other.admin.cookies)


@pytest.mark.parametrize(
    "path",
    [
        "//evil.example/",
        "/%5cevil.example",
        "/sign-in?next=//evil.example",
        "/?next=https://evil.example",
        "/%0d%0aLocation:%20https://evil.example",
    ],
)
def test_no_path_leads_to_another_site(site: ConsoleSite, path: str) -> None:
    for client in (site.visitor(), site.admin):
        answer = client.get(path)
        assert answer.headers.get("Location", "/sign-in") == "/sign-in"
        assert not re.search(r"""(href|action|src)=["'](https?:|/[/\\])""", answer.text)


@pytest.mark.parametrize(
    "path",
    [
        "/static/../console_server.py",
        "/static/%2e%2e/console_server.py",
        "/static/..%2fconsole_server.py",
        "/static/0/%2fetc%2fpasswd",
        "/static//etc/passwd",
        "/v1/fleet/bundles/..%2f..%2fauthority",
        "/v1/fleet/devices/..%2foperators",
    ],
)
def test_no_path_leads_out_of_its_folder(site: ConsoleSite, path: str) -> None:
    assert site.admin.get(path).status in (404, 405)


@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=range(len(HOSTILE_NAMES)))
def test_a_hostile_name_is_refused_in_few_characters(site: ConsoleSite, name: str) -> None:
    before = site.operators()
    answer = site.admin.post_json(OPERATORS, {"name": name, "role": "viewer"})
    assert answer.status == 400
    assert answer.headers["Content-Type"].startswith("application/json")
    assert "Set-Cookie" not in answer.headers
    assert len(answer.body) < 1000
    assert site.operators() == before


@pytest.mark.parametrize("name", HOSTILE_NAMES[:5], ids=range(5))
def test_a_hostile_path_is_text_in_the_page_about_it(site: ConsoleSite, name: str) -> None:
    escaped = "".join(f"%{byte:02x}" for byte in name.encode())
    for client, path in ((site.admin, f"/{escaped}"), (site.visitor(), f"/sign-in?link={escaped}")):
        answer = client.get(path)
        assert answer.status in (200, 404)
        assert "<script" not in answer.text
        assert "<img" not in answer.text


def hostile_bodies() -> list[tuple[str, bytes, dict[str, str]]]:
    zipped = {"Content-Encoding": "gzip"}
    return [
        ("an array in an array, often", b"[" * 500_000, {}),
        ("half of a surrogate pair", b'{"name": "\\ud800", "role": "viewer"}', {}),
        ("no UTF-8", b'{"name": "\xff", "role": "viewer"}', {}),
        ("a field twice", b'{"name": "<", "name": "eve", "role": "root"}', {}),
        ("3 MB", b" " * (3 << 20), {}),
        ("200 MB in 200 kB", gzip.compress(bytes(200_000_000)), zipped),
        ("no gzip", b"\x1f\x8b\x08 nonsense", zipped),
    ]


@pytest.mark.parametrize(
    ("body", "headers"),
    [pytest.param(body, headers, id=name) for name, body, headers in hostile_bodies()],
)
def test_a_hostile_body_is_refused(site: ConsoleSite, body: bytes, headers: dict[str, str]) -> None:
    answer = site.admin.send("POST", OPERATORS, body, JSON | SAME_ORIGIN | headers)
    assert answer.status in (400, 413)
    assert answer.error["message"]
    assert "eve" not in site.operators()


def test_a_large_form_is_refused_before_it_is_read(site: ConsoleSite) -> None:
    body = "link=" + "a" * 1_000_000
    assert site.visitor().send("POST", "/sign-in", body, FORM | SAME_ORIGIN).status == 413


def raw(site: ConsoleSite, text: bytes) -> bytes:
    """Return all that the server sends until it closes the connection."""
    with socket.create_connection(("127.0.0.1", site.server.port), WAIT_S) as connection:
        connection.sendall(text)
        received = b""
        while piece := connection.recv(65536):
            received += piece
    return received


@pytest.mark.parametrize(
    "request_",
    [
        b"POST /sign-in HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n"
        b"\r\n0\r\n\r\nGET /healthz HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost : a\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
    ],
    ids=["two lengths of a body", "two lengths", "a space", "a long header"],
)
def test_a_request_that_two_programs_may_read_differently_ends_the_connection(
    site: ConsoleSite, request_: bytes
) -> None:
    received = raw(site, request_)
    assert received.startswith(b"HTTP/1.0 400 ")
    assert received.count(b"HTTP/1.") == 1
    assert b"aiohttp" not in received


@pytest.mark.parametrize("method", ["TRACE", "PROPFIND"])
def test_other_methods_are_refused(site: ConsoleSite, method: str) -> None:
    answer = site.admin.send(method, DEVICES, headers=SAME_ORIGIN)
    assert answer.status == 405


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "top_k", "value": "[" * 10_000},
        {"name": "top_k", "value": "9" * 5000},
        {"name": "top_k", "value": "3", "version": "9" * 5000},
        {"name": "top_k", "value": '"\\ud800"'},
        {"name": "top_k", "value": "\x00"},
        {"name": "threshold", "value": "NaN"},
        {"name": "__class__", "value": "1"},
        {"name": "__class__", "remove": "1"},
        {"name": "top_k", "value": "1", "target": "device:<script>"},
        {"name": "<script>", "value": "<script>"},
        {},
    ],
    ids=range(11),
)
def test_a_hostile_form_is_refused_on_a_page(site: ConsoleSite, fields: dict[str, str]) -> None:
    answer = site.admin.post_form("/settings", **fields)
    assert answer.status == 400
    assert answer.headers["Content-Type"].startswith("text/html")
    assert "<script>" not in answer.text
    assert len(answer.body) < 20_000


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"name=%ff&value=\xff", FORM["Content-Type"]),
        (b"name=a", "application/x-www-form-urlencoded; charset=nonsense"),
        (b"x", "multipart/form-data"),
        (b"&".join(b"a%d=1" % i for i in range(5000)), FORM["Content-Type"]),
        (b"name=" + b"a" * 3_000_000, FORM["Content-Type"]),
    ],
    ids=["no UTF-8", "no charset", "no boundary", "5,000 fields", "3 MB"],
)
def test_bytes_that_are_no_form_of_a_page_are_refused(
    site: ConsoleSite, body: bytes, kind: str
) -> None:
    answer = site.admin.send("POST", "/settings", body, {"Content-Type": kind} | SAME_ORIGIN)
    assert answer.status in (400, 413)


@pytest.mark.parametrize("name", HOSTILE_NAMES[:6], ids=range(6))
@pytest.mark.parametrize(
    "address",
    [
        "/devices?search={}",
        "/devices?group={}&tag={}&state={}&status={}&sort={}&after={}",
        "/sessions?device={}",
        "/sessions?after={}",
        "/settings?target={}",
        "/identities?role={}&after={}",
        "/audit?subject={}&action={}",
        "/audit?after={}",
        "/rollouts?after={}",
        "/devices/{}",
        "/?notice={}",
        "/playground?device={}",
    ],
)
def test_a_hostile_address_is_text_on_its_page(site: ConsoleSite, name: str, address: str) -> None:
    escaped = "".join(f"%{byte:02x}" for byte in name.encode())
    answer = site.admin.get(address.replace("{}", escaped))
    assert answer.status in (200, 400, 404)
    assert "<script>" not in answer.text
    assert "<img" not in answer.text
    assert "Set-Cookie" not in answer.headers
