"""From every earlier version to the newest: no row is lost, and none is told otherwise."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine

from fleet.registry.database import parse_url
from fleet.registry.identities.states import IdentityState
from fleet.registry.stats.rollup_tables import HOUR_S, LEVELS, ROLLUPS, SPANS_S, SUMMED
from fleet.registry.store import Registry
from tests.fleet.registry.old_versions import NOW, make_old_registry, rows_of

VERSIONS = ("0001", "0002", "0003", "0004")


@pytest.mark.parametrize("version", VERSIONS)
def test_every_row_of_an_earlier_version_is_there_with_all_that_it_said(
    empty_url: str, version: str
) -> None:
    make_old_registry(empty_url, version)
    before = rows_of(empty_url)
    Registry.open(empty_url).close()
    after = rows_of(empty_url)
    added_spans = (
        set(SPANS_S) - {row["span_s"] for row in before["rollups"]}
        if "rollups" in before
        else set()
    )
    revoked = {row["name"]: is_revoked(row) for row in before["identities"]}
    assert {
        row["name"]: row["state"] == IdentityState.REVOKED for row in after["identities"]
    } == revoked
    del before["alembic_version"]
    for table, rows in before.items():
        there = [row for row in after[table] if row.get("span_s") not in added_spans]
        if table == "rollup_sources":
            rows = [row for row in rows if row["source"] not in SUMMED]
        kept = [{name: row[name] for name in rows[0]} for row in there] if rows else there
        assert sorted(kept, key=str) == sorted(rows, key=str), table


def is_revoked(row: dict[str, Any]) -> bool:
    """What a version said of an identity, taken out of the row where it was a column of its own."""
    return bool(row.pop("revoked")) if "revoked" in row else row["state"] == IdentityState.REVOKED


@pytest.mark.parametrize("version", ["0002", "0003", "0004"])
def test_longer_spans_hold_what_the_hours_do(empty_url: str, version: str) -> None:
    make_old_registry(empty_url, version)
    Registry.open(empty_url).close()
    rows = rows_of(empty_url)
    for table in LEVELS:
        about = [
            column.name for column in table.primary_key if column.name not in ("span_s", "start")
        ]
        amounts = [column.name for column in table.columns if not column.primary_key]
        sums: dict[int, Counter[tuple[str, ...]]] = {span_s: Counter() for span_s in SPANS_S}
        for row in rows[table.name]:
            key = tuple(row[name] for name in about)
            sums[row["span_s"]].update({(*key, name): row[name] for name in amounts})
        assert all(each == sums[HOUR_S] for each in sums.values()), table.name


@pytest.mark.parametrize("version", VERSIONS)
def test_who_was_revoked_stays_so_and_status_targets_and_counts_are_answered(
    empty_url: str, version: str
) -> None:
    make_old_registry(empty_url, version)
    with Registry.open(empty_url) as registry:
        assert [name for name in ("app-1", "edge-1", "edge-2") if registry.grants(name)] == [
            "app-1",
            "edge-1",
        ]
        assert {row.name: row.targets for row in registry.identities()}["app-1"] == (
            "edge-1",
            "north",
        )
        assert [(row.device, row.online, row.mode, row.last_seen) for row in registry.devices()] == [
            ("edge-1", True, "auto", 1000.0), ("edge-2", False, "auto", 1000.0),
        ]  # fmt: skip
        (row,) = registry.stats("edge-1", now=NOW)
        assert (row.generations, row.tokens, row.sources["cloud"]) == (20, 200, 40)
        assert [(row.device, row.session) for row in registry.sessions()] == [("edge-1", "s1")]


@pytest.mark.parametrize("version", VERSIONS)
def test_the_tables_of_an_earlier_version_become_those_of_the_models(
    empty_url: str, version: str
) -> None:
    make_old_registry(empty_url, version)
    Registry.open(empty_url).close()
    engine = create_engine(parse_url(empty_url))
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), ROLLUPS.metadata) == []
    engine.dispose()
