"""A device that floods the server with reports delays no receipt of its neighbour for long."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.system.hostile_reports import (
    MAX_GROWTH_BYTES,
    FloodedFleet,
    MakeReport,
    flooded_fleet,
    implausible,
    plausible,
)

FLOOD_BYTES = 4_000_000
FLOOD_S = 3.0
LONGEST_S = 20.0
"""Without a share for each device the neighbour waits until the whole flood is stored."""


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FloodedFleet]:
    with flooded_fleet(tmp_path_factory.mktemp("flooded")) as running:
        yield running


@pytest.mark.parametrize("make_report", [implausible, plausible])
def test_a_flood_of_reports_delays_no_receipt_and_fills_no_registry(
    fleet: FloodedFleet, make_report: MakeReport
) -> None:
    figures = fleet.flood(make_report, FLOOD_BYTES, FLOOD_S)
    assert figures.sent_bytes >= FLOOD_BYTES
    assert figures.longest_receipt_s < LONGEST_S
    assert figures.growth_bytes <= MAX_GROWTH_BYTES
