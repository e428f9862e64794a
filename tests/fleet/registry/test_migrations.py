"""Migrations from every earlier version to the newest: no row is lost or altered."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine

from fleet.protocol.report import ConfigProblem
from fleet.registry.database import alembic_config, parse_url
from fleet.registry.identities.lifecycle import IdentityState
from fleet.registry.stats.rollup_columns import HOUR_S, SPANS_S, SUMMED
from fleet.registry.stats.rollup_tables import LEVELS, ROLLUPS
from fleet.registry.store import Registry
from tests.fleet.conftest import report
from tests.fleet.registry.old_versions import (
    FINAL_TEXT,
    NOT_YET_TEXT,
    NOW,
    Rows,
    make_old_registry,
    rows_of,
)

SCRIPTS = ScriptDirectory.from_config(alembic_config())
_, *EARLIER = (script.revision for script in SCRIPTS.walk_revisions())


@pytest.mark.parametrize("version", EARLIER)
def test_every_row_of_an_earlier_version_is_kept_with_all_its_values(
    empty_url: str, version: str
) -> None:
    make_old_registry(empty_url, version)
    old = rows_of(empty_url)
    Registry.open(empty_url).close()
    new = rows_of(empty_url)
    old_spans = {row["span_s"] for row in old.get("rollups", [])}
    added_spans = set(SPANS_S) - old_spans if old_spans else set()
    revoked = {row["name"]: is_revoked(row) for row in old["identities"]}
    assert {row["name"]: is_revoked(row) for row in new["identities"]} == revoked
    for row in old["device_status"]:
        row.pop("config_error", None)  # an object now
    del old["alembic_version"]
    for table, rows in old.items():
        kept = [row for row in new[table] if row.get("span_s") not in added_spans]
        if table == "rollup_sources":
            rows = [row for row in rows if row["source"] not in SUMMED]
        assert sorted(with_fields_of(rows, kept), key=str) == sorted(rows, key=str), table


def with_fields_of(old: Rows, new: Rows) -> Rows:
    """Return the new rows with the columns of the old ones only."""
    return [{name: row[name] for name in old[0]} for row in new] if old else new


def is_revoked(row: dict[str, Any]) -> bool:
    """Whether an identity is revoked; removes the column that only the first version has."""
    return bool(row.pop("revoked")) if "revoked" in row else row["state"] == IdentityState.REVOKED


@pytest.mark.parametrize("version", ["0004", "0005"])
def test_the_text_of_a_configuration_error_becomes_a_problem(empty_url: str, version: str) -> None:
    make_old_registry(empty_url, version)
    with Registry.open(empty_url) as registry:
        problems = [row.config_error for row in registry.stats.devices()]
    assert problems == [
        ConfigProblem("unknown", NOT_YET_TEXT, is_final=False),
        ConfigProblem("unknown", FINAL_TEXT, is_final=True),
    ]


@pytest.mark.parametrize("version", ["0001", "0003"])
def test_a_device_without_a_configuration_error_has_no_problem(
    empty_url: str, version: str
) -> None:
    make_old_registry(empty_url, version)
    with Registry.open(empty_url) as registry:
        assert [row.config_error for row in registry.stats.devices()] == [None, None]


@pytest.mark.parametrize("version", ["0002", "0003", "0004"])
def test_longer_spans_hold_the_sums_of_their_hours(empty_url: str, version: str) -> None:
    make_old_registry(empty_url, version)
    Registry.open(empty_url).close()
    rows = rows_of(empty_url)
    for table in LEVELS:
        keys = [
            column.name for column in table.primary_key if column.name not in ("span_s", "start")
        ]
        amounts = [column.name for column in table.columns if not column.primary_key]
        sums: dict[int, Counter[tuple[str, ...]]] = {span_s: Counter() for span_s in SPANS_S}
        for row in rows[table.name]:
            key = tuple(row[name] for name in keys)
            sums[row["span_s"]].update({(*key, name): row[name] for name in amounts})
        assert all(each == sums[HOUR_S] for each in sums.values()), table.name


@pytest.mark.parametrize("version", EARLIER)
def test_a_revoked_identity_stays_revoked_and_statuses_targets_and_counts_are_kept(
    empty_url: str, version: str
) -> None:
    make_old_registry(empty_url, version)
    with Registry.open(empty_url) as registry:
        names = ("app-1", "edge-1", "edge-2")
        active = [name for name in names if registry.identities.grants(name)]
        assert active == ["app-1", "edge-1"]
        targets = {row.name: row.targets for row in registry.identities.all()}
        assert targets["app-1"] == ("edge-1", "north")
        devices = registry.stats.devices()
        assert [(row.device, row.online, row.mode, row.last_seen) for row in devices] == [
            ("edge-1", True, "auto", 1000.0),
            ("edge-2", False, "auto", 1000.0),
        ]
        (row,) = registry.stats.per_device("edge-1", now=NOW)
        assert (row.generations, row.tokens, row.sources["cloud"]) == (20, 200, 40)
        sessions = registry.stats.sessions()
        assert [(row.device, row.session) for row in sessions] == [("edge-1", "s1")]


@pytest.mark.parametrize("version", ["0004", "0007"])
def test_a_bundle_and_its_roll_out_are_kept_and_the_bundle_can_be_named(
    empty_url: str, version: str
) -> None:
    make_old_registry(empty_url, version)
    with Registry.open(empty_url) as registry:
        (row,) = registry.rollouts.bundles()
        assert (row.bundle_id, row.name, row.added_at) == ("b1", None, 1000.0)
        registry.rollouts.rename_bundle("b1", "first")
        (rollout,) = registry.rollouts.latest(NOW)
        assert (rollout.bundle_id, rollout.bundle_name, rollout.state) == (
            "b1",
            "first",
            "completed",
        )


def test_roll_ups_of_an_earlier_version_have_no_mode_and_new_answers_have_theirs(
    empty_url: str,
) -> None:
    make_old_registry(empty_url, "0007")
    started_at = NOW - 1800.0  # in the hour of an old answer
    with Registry.open(empty_url) as registry:
        new = report("new", bundle_id="b1", mode="standalone", started_at=started_at)
        registry.stats.record_report("edge-1", new)
        (row,) = registry.stats.per_device("edge-1", now=NOW)
    assert row.generations == 21
    hours = [each for each in rows_of(empty_url)["rollups"] if each["span_s"] == HOUR_S]
    in_hour = {each["mode"]: each["answers"] for each in hours if each["start"] + 3600 > started_at}
    assert in_hour == {"": 1, "standalone": 1}


@pytest.mark.parametrize("version", EARLIER)
def test_the_tables_of_an_earlier_version_become_those_of_the_models(
    empty_url: str, version: str
) -> None:
    make_old_registry(empty_url, version)
    Registry.open(empty_url).close()
    engine = create_engine(parse_url(empty_url))
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), ROLLUPS.metadata) == []
    engine.dispose()
