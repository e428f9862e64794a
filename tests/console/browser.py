"""The distribution's Chromium, headless, and what it reports of each page."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final, Literal
from urllib.parse import urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, sync_playwright

WAIT_MS: Final = 120_000.0
HEIGHT: Final = 900
WIDTHS: Final = (390, 1280)
Scheme = Literal["light", "dark"]
SCHEMES: Final[tuple[Scheme, ...]] = ("light", "dark")
LOOKS: Final = [(scheme, width) for scheme in SCHEMES for width in WIDTHS]
"""Each colour scheme with each width of the window."""

LOCAL_SCHEMES: Final = ("data", "blob", "about")


def find_chromium() -> str:
    """Return the path of Chromium; skip the test without it, or fail under CI."""
    path = shutil.which("chromium")
    if path is None:
        reason = "chromium is not installed; on Debian: apt-get install chromium"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return path


@contextmanager
def running_browser() -> Iterator[Browser]:
    """Run Chromium without a window; its sandbox needs a user that is not root."""
    path = find_chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, chromium_sandbox=os.geteuid() != 0, timeout=WAIT_MS
        )
        yield browser
        browser.close()


class Visitor:
    """One person's browser window: own cookies, one page, and the problems that it reports.

    Problems are errors in the console (also those of the content security policy), exceptions of
    scripts, and requests to another address than `origin`.
    """

    def __init__(
        self,
        browser: Browser,
        origin: str,
        *,
        scheme: Scheme = "light",
        width: int = WIDTHS[-1],
        scripts: bool = True,
    ) -> None:
        self.origin = origin
        self.problems: list[str] = []
        self.requests: list[Request] = []
        self.context = browser.new_context(
            base_url=origin,
            viewport={"width": width, "height": HEIGHT},
            color_scheme=scheme,
            java_script_enabled=scripts,
            reduced_motion="reduce",
            ignore_https_errors=True,
        )
        self.context.set_default_timeout(WAIT_MS)
        self.context.on("console", self._on_console)
        self.context.on("weberror", lambda error: self.problems.append(f"script: {error.error}"))
        self.context.on("request", self._on_request)
        self.page = self.context.new_page()

    def _on_console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.problems.append(f"console: {message.text} ({message.location['url']})")

    def _on_request(self, request: Request) -> None:
        self.requests.append(request)
        url = urlsplit(request.url)
        if url.scheme not in LOCAL_SCHEMES and f"{url.scheme}://{url.netloc}" != self.origin:
            self.problems.append(f"request to another address: {request.url}")

    def close(self) -> None:
        self.context.close()

    def check(self, *, expected: Sequence[str] = ()) -> None:
        """Fail if the browser reported anything that no pattern of `expected` matches."""
        problems = [
            problem
            for problem in self.problems
            if not any(re.search(pattern, problem) for pattern in expected)
        ]
        self.problems.clear()
        assert not problems, problems


def serious_flaws(page: Page) -> list[str]:
    """Return what axe finds that is serious or critical, with the elements."""
    response = Axe().run(page).response
    assert response["testEngine"]["name"] == "axe-core"
    return [
        f"{rule['id']} ({rule['impact']}): {rule['help']}: "
        + "; ".join(node["html"] for node in rule["nodes"])
        for rule in response["violations"]
        if rule["impact"] in ("serious", "critical")
    ]


def is_wider_than_window(page: Page) -> bool:
    """Whether a reader must scroll sideways."""
    return bool(page.evaluate("document.documentElement.scrollWidth > window.innerWidth"))


def internal_paths(page: Page) -> set[str]:
    """Return the paths, with their queries, of the links of a page that lead into the console."""
    addresses: list[str] = page.eval_on_selector_all("a[href]", "links => links.map(a => a.href)")
    parts = [urlsplit(address) for address in addresses]
    here = urlsplit(page.url)
    return {
        f"{each.path}?{each.query}" if each.query else each.path
        for each in parts
        if (each.scheme, each.netloc) == (here.scheme, here.netloc)
    }
