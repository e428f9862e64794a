"""One browser a module; each test has windows of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser

from tests.console.browser import running_browser
from tests.console.console_site import ConsoleSite, console_site


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium without a window."""
    with running_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ConsoleSite]:
    """A console without devices that run."""
    with console_site(tmp_path_factory.mktemp("site")) as site:
        yield site
