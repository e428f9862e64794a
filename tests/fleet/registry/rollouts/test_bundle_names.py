"""Names of bundles, and the texts that a bundle is found by."""

from __future__ import annotations

import pytest

from fleet.errors import RolloutError
from fleet.protocol.report import DeviceStatus
from fleet.registry.results import BundleStats
from fleet.registry.rollouts.bundle_names import matching_ids
from fleet.registry.stats.queries import By
from fleet.registry.store import Registry
from tests.fleet.conftest import add, report

FIRST = "ab12" + "0" * 28
SECOND = "ab12" + "f" * 28
THIRD = "cd34" + "0" * 28


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        (FIRST, [FIRST]),
        ("spring", [SECOND]),
        ("cd34", [THIRD]),
        ("ab120", [FIRST]),
        ("ab12", [FIRST, SECOND]),
        ("cd3", []),
        ("CD34", [THIRD]),
        ("CD3", []),
        (FIRST.upper(), [FIRST]),
        ("sprin", []),
        ("", []),
    ],
)
def test_a_text_is_an_id_a_name_or_the_beginning_of_an_id(text: str, ids: list[str]) -> None:
    names = {FIRST: None, SECOND: "spring", THIRD: None}
    assert matching_ids(text, names) == ids


@pytest.fixture
def bundles(registry: Registry) -> Registry:
    for bundle_id in (FIRST, SECOND, THIRD):
        registry.rollouts.add_bundle(bundle_id, "tiny", 1000)
    registry.rollouts.rename_bundle("ab12f", "spring")
    return registry


def test_an_ambiguous_beginning_lists_the_candidates(bundles: Registry) -> None:
    assert bundles.rollouts.find_bundle("spring") == SECOND
    with pytest.raises(RolloutError) as error:
        bundles.rollouts.find_bundle("ab12")
    assert str(error.value) == (
        f"bundle 'ab12' is ambiguous: {FIRST}, {SECOND} (spring); give more digits, or a name"
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "expected at most 63 letters"),
        ("-x", "expected at most 63 letters"),
        ("a b", "expected at most 63 letters"),
        ("sp\x1bring", "expected at most 63 letters"),
        ("x" * 64, "expected at most 63 letters"),
        ("beef", "it could be the beginning of an id"),
        ("spring", f"is that of bundle {SECOND}"),
    ],
)
def test_a_name_is_plain_and_unique(bundles: Registry, name: str, message: str) -> None:
    with pytest.raises(RolloutError, match=message):
        bundles.rollouts.rename_bundle(FIRST, name)
    assert [row.name for row in bundles.rollouts.bundles() if row.bundle_id == FIRST] == [None]


def test_a_bundle_keeps_its_name_when_it_is_named_so_again(bundles: Registry) -> None:
    assert bundles.rollouts.rename_bundle("spring", "spring") == SECOND
    assert bundles.rollouts.rename_bundle("spring", "v2.1_final") == SECOND
    (entry, *_) = bundles.audit_log.entries(f"bundle:{SECOND}")
    assert (entry.action, entry.details) == (
        "bundle_name",
        {"name": "v2.1_final", "before": "spring"},
    )


def test_devices_and_statistics_show_the_name(bundles: Registry) -> None:
    add(bundles, "edge-1")
    status = DeviceStatus(online=True, epoch=1, bundle_id=SECOND)
    bundles.stats.record_status("edge-1", status, 1000.0)
    bundles.stats.record_report("edge-1", report(bundle_id=SECOND))
    assert [row.bundle_name for row in bundles.stats.devices()] == ["spring"]
    (row,) = bundles.stats.grouped(By.BUNDLE)
    assert isinstance(row, BundleStats)
    assert (row.bundle_id, row.bundle_name) == (SECOND, "spring")
