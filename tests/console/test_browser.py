"""The checks of the browser find what they look for; so a page without a finding has none."""

from __future__ import annotations

from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Final

import pytest
from playwright.sync_api import Browser

from tests.console.browser import SCHEMES, Visitor, is_wider_than_window, serious_flaws

HEAD: Final = '<!doctype html><html lang="en"><title>t</title><link rel="icon" href="data:,">'
IMAGE: Final = "data:image/gif;base64,R0lGODlhAQABAAAAACw="
PAGES: Final = {
    "/good": f"{HEAD}<main><h1>Devices</h1><p>One</p></main>",
    "/inline": f"{HEAD}<main><h1>A</h1></main><script>document.title = 'changed'</script>",
    "/style": f"{HEAD}<main><h1 style='color: red'>A</h1></main>",
    "/elsewhere": f"{HEAD}<main><h1>A</h1><img src='http://127.0.0.1:1/a' alt='a'></main>",
    "/error": f"{HEAD}<main><h1>A</h1></main><script src='/error.js'></script>",
    "/error.js": "throw new Error('a script failed')",
    "/image": f"{HEAD}<main><h1>A</h1><img src='{IMAGE}'></main>",
    "/wide": f"{HEAD}<main><h1>A</h1><table><tr><td>{'x' * 500}</table></main>",
}


class Handler(BaseHTTPRequestHandler):
    """Serve `PAGES` under a policy that allows only what this server sends."""

    def do_GET(self) -> None:
        body = PAGES[self.path].encode()
        self.send_response(200)
        script = self.path.endswith(".js")
        self.send_header("Content-Type", "text/javascript" if script else "text/html")
        policy = "default-src 'self'; img-src *" if "image" not in self.path else "img-src data:"
        self.send_header("Content-Security-Policy", policy + " data:")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Log nothing."""


@pytest.fixture(scope="module")
def origin() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def visitor(browser: Browser, origin: str) -> Iterator[Visitor]:
    visitor = Visitor(browser, origin, width=390)
    yield visitor
    visitor.close()


def test_a_good_page_has_no_problem_in_either_colour_scheme(browser: Browser, origin: str) -> None:
    for scheme in SCHEMES:
        visitor = Visitor(browser, origin, scheme=scheme)
        visitor.page.goto("/good")
        assert visitor.page.evaluate(f"matchMedia('(prefers-color-scheme: {scheme})').matches")
        assert serious_flaws(visitor.page) == []
        assert not is_wider_than_window(visitor.page)
        visitor.check()
        visitor.close()


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("/inline", "Content Security Policy"),
        ("/style", "Content Security Policy"),
        ("/elsewhere", "another address"),
        ("/error", "a script failed"),
    ],
)
def test_problems_of_a_page_are_reported(visitor: Visitor, path: str, problem: str) -> None:
    visitor.page.goto(path)
    with pytest.raises(AssertionError, match=problem):
        visitor.check()


def test_an_image_without_a_text_is_a_serious_flaw(visitor: Visitor) -> None:
    visitor.page.goto("/image")
    (flaw,) = serious_flaws(visitor.page)
    assert "image-alt" in flaw
    visitor.check()


def test_a_page_that_must_be_scrolled_sideways_is_noticed(visitor: Visitor) -> None:
    visitor.page.goto("/wide")
    assert is_wider_than_window(visitor.page)


def test_without_scripts_a_page_is_read_as_it_came(browser: Browser, origin: str) -> None:
    visitor = Visitor(browser, origin, scripts=False)
    visitor.page.goto("/inline")
    assert visitor.page.title() == "t"
    visitor.close()
