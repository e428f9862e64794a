"""One browser a module; each test has windows of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser

from fleet.operator_api.operation import OperatorRole
from tests.conftest import MakeTinyBundle
from tests.console.browser import running_browser
from tests.console.console_site import ConsoleSite, console_site
from tests.console.running_fleet import RunningFleet, running_fleet


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


@pytest.fixture(scope="module")
def fleet(
    tmp_path_factory: pytest.TempPathFactory, make_tiny_bundle: MakeTinyBundle
) -> Iterator[RunningFleet]:
    """A whole fleet, with an operator of each role."""
    folder = tmp_path_factory.mktemp("fleet")
    with running_fleet(folder, make_tiny_bundle((1, 2)), make_tiny_bundle((1,))) as fleet:
        for role in OperatorRole:
            fleet.registry.operators.add(role.value, role)
        yield fleet
