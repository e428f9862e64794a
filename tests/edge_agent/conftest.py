"""A running service of a fleet, for tests of a device's requests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.edge_agent.fleet_service import FleetService


@pytest.fixture
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FleetService]:
    """A service on 127.0.0.1 with its own CA."""
    with FleetService(tmp_path_factory.mktemp("service")).running() as running:
        yield running
