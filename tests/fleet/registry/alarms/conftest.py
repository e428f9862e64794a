"""The site of the tests of alarms, on each database."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fleet.registry.store import Registry
from fleet.transport.in_memory import InMemoryBroker
from tests.fleet.registry.alarms.alarm_site import AlarmSite


@pytest.fixture
def site(registry: Registry, registry_url: str) -> Iterator[AlarmSite]:
    with InMemoryBroker().connect("collector") as link:
        yield AlarmSite(registry, registry_url, link)
