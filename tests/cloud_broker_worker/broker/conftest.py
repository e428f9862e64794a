"""A running broker of each kind, with the small fleet of `tests.brokers`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.brokers import BROKERS, Site, running_site


@pytest.fixture(params=BROKERS)
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    with running_site(request.param, tmp_path) as running:
        yield running


@pytest.fixture
def embedded_site(tmp_path: Path) -> Iterator[Site]:
    with running_site("embedded", tmp_path) as running:
        yield running
