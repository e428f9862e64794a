"""Reports of many devices through faults of the server and of its database."""

from __future__ import annotations

from pathlib import Path

from benchmarks.postgresql import postgresql_server
from tests.postgresql import Databases
from tests.system.report_flood import flood


def test_a_flood_is_counted_once_though_the_server_is_killed_and_its_database_locked(
    tmp_path: Path,
) -> None:
    """At its full size this is ``python -m tests.system.report_flood``."""
    flood(tmp_path, num_devices=40, num_reports=4000, away_s=2.0)


def test_a_flood_is_counted_once_though_the_databases_server_stops(
    tmp_path: Path, postgresql: Databases
) -> None:
    del postgresql  # which others use: this server is stopped
    with postgresql_server() as server:
        flood(tmp_path, num_devices=20, num_reports=1000, away_s=2.0, postgresql=server)
