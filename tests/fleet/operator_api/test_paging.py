"""Lists in pages, also of a server that is faulty."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fleet.errors import ServiceError
from fleet.operator_api.device_operations import LIST_DEVICES, DeviceList, DeviceQuery
from fleet.operator_api.fleet_access import FleetAccess
from fleet.operator_api.operation import Operation
from fleet.operator_api.paging import walk_pages
from fleet.operator_api.stats_operations import LIST_SESSIONS, SessionQuery
from tests.fleet.operator_api.api_fleet import local_access, make_fleet, serving


def test_pages_have_each_row_once_also_if_the_last_row_of_one_is_deleted(tmp_path: Path) -> None:
    home = make_fleet(tmp_path / "fleet")
    with serving(home) as server, server.access() as access, local_access(home) as local:
        names: list[str] = []
        for page in walk_pages(access, LIST_DEVICES, DeviceQuery(limit=1)):
            names += [row.device for row in page.devices]
            if names[-1] == "cellar":
                local.context.registry.identities.revoke("cellar")
                local.context.registry.identities.delete("cellar")
        assert names == ["attic", "cellar", "kitchen", "newcomer"]
        for limit in (1, 2, 3, 100):
            pages = walk_pages(access, LIST_SESSIONS, SessionQuery(limit=limit))
            sessions = [row.session for page in pages for row in page.sessions]
            assert sessions == [
                "now",
                *(f"{device}-{i}" for i in (2, 1, 0) for device in ("attic", "kitchen")),
            ]


class _Repeating(FleetAccess):
    """A server that never comes to an end."""

    def call(self, operation: Operation[Any, Any], request: Any) -> Any:
        return DeviceList(devices=[], total=0, next_page="kitchen")


def test_a_page_that_repeats_ends_the_list_with_an_error() -> None:
    with pytest.raises(ServiceError, match="faulty"):
        list(walk_pages(_Repeating(), LIST_DEVICES, DeviceQuery()))
