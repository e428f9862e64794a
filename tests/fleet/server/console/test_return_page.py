"""A session that ends in the midst: the sign-in tells what was lost, and leads back to the page."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fleet.operator_api.operation import OperatorRole
from fleet.server.console.return_page import is_own_path
from tests.console.console_site import ConsoleSite, console_site
from tests.console.web_client import Received, WebClient


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ConsoleSite]:
    with console_site(tmp_path_factory.mktemp("site")) as site:
        yield site


def sign_in(site: ConsoleSite, client: WebClient) -> str:
    """Sign a client in; return the address to which it is led."""
    answer = client.post_form("/sign-in", link=site.new_link())
    assert answer.status == 303
    return answer.headers["Location"]


def expired(site: ConsoleSite) -> WebClient:
    """Return a client whose session has ended."""
    client = site.sign_in(OperatorRole.ADMIN)
    site.registry.operators.sign_out(next(iter(client.cookies.values())))
    return client


@pytest.mark.parametrize(
    ("path", "page"),
    [
        ("/rollouts/1/pause", "/rollouts/1"),
        ("/rollouts", "/rollouts"),
        ("/operators/eve/remove", "/operators"),
        ("/bundles/abcd/name", "/bundles"),
        ("/devices/kitchen/suspend", "/devices/kitchen"),
        ("/settings", "/settings"),
        ("/playground", "/playground"),
        ("/nowhere/at/all", "/"),
    ],
)
def test_a_form_after_the_end_of_a_session_is_told_and_its_page_shown_again(
    site: ConsoleSite, path: str, page: str
) -> None:
    client = expired(site)
    answer = client.post_form(path)
    assert (answer.status, answer.headers["Location"]) == (303, "/sign-in?unsaved=1")
    assert "your last change was not made" in client.get(answer.headers["Location"]).text
    assert sign_in(site, client) == page
    assert client.get(page).status == 200
    assert sign_in(site, client) == "/"  # once


@pytest.mark.parametrize(
    ("path", "page"),
    [
        ("/devices?group=house&sort=name", "/devices?group=house&sort=name"),
        ("/no-such-page", "/"),
        ("/devices?search=" + "x" * 600, "/"),
        ("//evil.example/devices", "/"),
        ("/%5cevil.example", "/"),
    ],
)
def test_a_page_after_the_end_of_a_session_is_shown_after_the_sign_in(
    site: ConsoleSite, path: str, page: str
) -> None:
    client = expired(site)
    answer = client.get(path)
    assert (answer.status, answer.headers["Location"]) == (303, "/sign-in")
    assert "HttpOnly" in cookie_of(answer)
    assert "SameSite=Strict" in cookie_of(answer)
    assert sign_in(site, client) == page


def cookie_of(answer: Received) -> str:
    return str(answer.headers["Set-Cookie"])


def test_signing_out_twice_loses_nothing(site: ConsoleSite) -> None:
    assert expired(site).post_form("/sign-out").headers["Location"] == "/sign-in"


@pytest.mark.parametrize(
    "page",
    ["//evil.example", "https://evil.example", "/\\evil.example", "/a\r\nb", "", "x", "/\u202e"],
)
def test_a_cookie_of_an_attacker_leads_nowhere_else(site: ConsoleSite, page: str) -> None:
    assert not is_own_path(page)
    client = site.visitor()
    client.get("/devices")
    (name,) = client.cookies
    if page.isascii() and page.isprintable():
        client.cookies[name] = page
        assert sign_in(site, client) == "/"


def test_a_link_signs_in_one_browser_alone(site: ConsoleSite) -> None:
    link = site.new_link()
    thief, owner = (site.visitor() for _ in range(2))
    assert thief.post_form("/sign-in", link=link).status == 303
    answer = owner.post_form("/sign-in", link=link)
    assert (answer.status, "was used" in answer.text) == (403, True)
