"""From every earlier version to the newest: no row is lost, and none is told otherwise."""

from __future__ import annotations

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine

from fleet.registry.database import parse_url
from fleet.registry.rollup_tables import ROLLUPS
from fleet.registry.states import State
from fleet.registry.store import Registry
from tests.registry.old_versions import NOW, make_old_registry, rows_of

VERSIONS = ("0001", "0002", "0003")


@pytest.mark.parametrize("version", VERSIONS)
def test_every_row_of_an_earlier_version_is_there_with_all_that_it_said(empty_url: str, version: str) -> None:
    make_old_registry(empty_url, version)
    before = rows_of(empty_url)
    Registry.open(empty_url).close()
    after = rows_of(empty_url)
    revoked = {row["name"]: bool(row.pop("revoked")) for row in before["identities"]}
    assert {row["name"]: row["state"] == State.REVOKED for row in after["identities"]} == revoked
    del before["alembic_version"]
    for table, rows in before.items():
        kept = [{name: row[name] for name in rows[0]} for row in after[table]] if rows else after[table]
        assert sorted(kept, key=str) == sorted(rows, key=str), table


@pytest.mark.parametrize("version", VERSIONS)
def test_who_was_revoked_stays_so_and_status_targets_and_counts_are_answered(empty_url: str, version: str) -> None:
    make_old_registry(empty_url, version)
    with Registry.open(empty_url) as registry:
        assert [name for name in ("app-1", "edge-1", "edge-2") if registry.grants(name)] == ["app-1", "edge-1"]
        assert {row.name: row.targets for row in registry.identities()}["app-1"] == ("edge-1", "north")
        assert [(row.device, row.online, row.mode, row.last_seen) for row in registry.devices()] == [
            ("edge-1", True, "auto", 1000.0), ("edge-2", False, "auto", 1000.0),
        ]  # fmt: skip
        (row,) = registry.stats("edge-1", now=NOW)
        assert (row.generations, row.tokens, row.sources["cloud"]) == (20, 200, 40)
        assert [(row.device, row.session) for row in registry.sessions()] == [("edge-1", "s1")]


@pytest.mark.parametrize("version", VERSIONS)
def test_the_tables_of_an_earlier_version_become_those_of_the_models(empty_url: str, version: str) -> None:
    make_old_registry(empty_url, version)
    Registry.open(empty_url).close()
    engine = create_engine(parse_url(empty_url))
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), ROLLUPS.metadata) == []
    engine.dispose()
