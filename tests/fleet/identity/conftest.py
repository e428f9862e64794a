"""A running service of a fleet, for tests of renewal."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.edge_agent.fleet_service import FleetService


@pytest.fixture
def service(tmp_path: Path) -> Iterator[FleetService]:
    """A service on 127.0.0.1 with its own CA."""
    with FleetService(tmp_path / "service").running() as running:
        yield running
