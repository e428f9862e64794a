"""Databases that are locked, away, gone or full: each gives its own error and no partial write."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import create_engine, event, text
from sqlalchemy.pool import Pool

from benchmarks.postgresql import OWNER
from fleet.errors import RegistryError
from fleet.registry import database
from fleet.registry.store import Registry
from tests.fleet.conftest import add, report
from tests.fleet.registry.old_versions import make_old_registry, rows_of
from tests.postgresql import Databases

LOCKER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("locked", flush=True)
sys.stdin.read()
"""


@contextmanager
def locked(url: str) -> Iterator[None]:
    """A lock that another process holds and a write needs: SQLite's, or that of a table."""
    if url.startswith("postgresql"):
        with psycopg.connect(url) as connection:
            connection.execute("LOCK TABLE identities IN EXCLUSIVE MODE")
            yield
            connection.rollback()
        return
    path = url.removeprefix("sqlite:///")
    locker = subprocess.Popen(
        [sys.executable, "-c", LOCKER, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with locker:
        assert locker.stdout
        assert locker.stdout.readline() == "locked\n"
        yield
        locker.communicate(timeout=10)


def num_until_full(registry: Registry) -> int:
    """Store reports until there is no room for another; return their number."""
    number = 0
    refusal = ""
    while not refusal and number < 10_000:
        try:
            registry.stats.record_report("edge-1", report(f"g{number}", session=f"s{number}"))
            number += 1
        except RegistryError as error:
            refusal = str(error)
    assert re.search(r"has no room for more \(.*nothing of this change is stored\Z", refusal)
    return number


def check_whole(registry: Registry, num_reports: int) -> None:
    """Check that answers, tokens, sessions and roll-ups are those of `num_reports` reports."""
    (row,) = registry.stats.per_device()
    assert (row.generations, sum(row.sources.values())) == (num_reports, 10 * num_reports)
    assert len(registry.stats.sessions(limit=10_000)) == num_reports


@contextmanager
def no_room() -> Iterator[None]:
    """Keep SQLite files that are opened from now on from growing."""

    def limit(connection: sqlite3.Connection, _: object) -> None:
        (count,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count = {count}")

    event.listen(Pool, "connect", limit)
    try:
        yield
    finally:
        event.remove(Pool, "connect", limit)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "BUSY_TIMEOUT_S", 0.3)


@pytest.mark.usefixtures("impatient")
def test_a_write_to_a_locked_registry_fails_in_time_and_succeeds_when_it_is_free(
    registry_url: str,
) -> None:
    with Registry.open(registry_url) as registry:
        add(registry, "edge-1")
        with locked(registry_url):
            with pytest.raises(
                RegistryError, match=r"was locked for 0.3 s \(.*\); end the process that holds it"
            ):
                add(registry, "edge-2")
            assert [row.name for row in registry.identities.all()] == ["edge-1"]
        add(registry, "edge-2")
        assert [row.name for row in registry.identities.all()] == ["edge-1", "edge-2"]


@pytest.mark.usefixtures("impatient")
def test_opening_a_locked_sqlite_registry_says_that_it_is_locked(tmp_path: Path) -> None:
    path = tmp_path / "registry.sqlite"
    Registry.open(path).close()
    with locked(f"sqlite:///{path}"), pytest.raises(RegistryError, match="was locked"):
        Registry.open(path)


@pytest.mark.usefixtures("impatient")
def test_opening_a_postgresql_registry_during_a_migration_does_not_wait_for_ever(
    postgresql: Databases,
) -> None:
    with postgresql.database() as url, psycopg.connect(url) as other:
        other.execute("SELECT pg_advisory_lock(%s)", (database.MIGRATION_LOCK,))
        with pytest.raises(RegistryError, match="was locked"):
            Registry.open(url)


def test_a_query_that_takes_postgresql_too_long_is_cancelled(
    postgresql: Databases, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "QUERY_TIMEOUT_S", 0.3)
    with postgresql.database() as url, Registry.open(url) as registry:
        add(registry, "edge-1")
        with psycopg.connect(url) as other:
            other.execute("ALTER TABLE identities RENAME TO kept")
            other.execute("CREATE VIEW identities AS SELECT kept.* FROM kept, pg_sleep(60)")
        with pytest.raises(
            RegistryError, match=r"worked for 0.3 s on one query \(.*\); query less"
        ):
            registry.identities.all()


def test_a_sqlite_file_that_is_deleted_is_missed_and_no_other_is_made(tmp_path: Path) -> None:
    path = tmp_path / "registry.sqlite"
    with Registry.open(path) as registry:
        add(registry, "edge-1")
        path.rename(tmp_path / "away")
        for _ in range(2):
            with pytest.raises(RegistryError, match="its file is gone; put it back"):
                add(registry, "edge-2")
            registry.close()  # the next query opens the file again
        assert not path.exists()
        (tmp_path / "away").rename(path)
        assert [row.name for row in registry.identities.all()] == ["edge-1"]


def test_a_sqlite_file_in_place_of_the_one_that_was_opened_is_not_written_to(
    tmp_path: Path,
) -> None:
    path = tmp_path / "registry.sqlite"
    with Registry.open(path) as registry:
        path.unlink()
        Registry.open(path).close()
        with pytest.raises(RegistryError, match="another file is in its place; start again"):
            add(registry, "edge-1")
    with Registry.open(path) as registry:
        assert registry.identities.all() == []


def test_a_postgresql_server_that_stops_is_missed_and_found_again(postgresql: Databases) -> None:
    with postgresql.database() as url, Registry.open(url) as registry:
        add(registry, "edge-1")
        postgresql.server.stop()
        try:
            with pytest.raises(
                RegistryError, match=r"is not available: .*refused.*; check its path or URL"
            ):
                add(registry, "edge-2")
            with pytest.raises(RegistryError, match=r"is not available: .*refused"):
                Registry.open(url)
        finally:
            postgresql.server.start()
        assert [row.name for row in registry.identities.all()] == ["edge-1"]


def test_a_postgresql_database_that_is_dropped_is_missed(postgresql: Databases) -> None:
    url = postgresql.server.create("dropped", "ready")
    with Registry.open(url) as registry:
        postgresql.server.drop("dropped")
        with pytest.raises(RegistryError, match=r"is not available: .*does not exist"):
            add(registry, "edge-1")


def test_a_damaged_file_is_reported_as_damaged(tmp_path: Path) -> None:
    path = tmp_path / "registry.sqlite"
    with Registry.open(path) as registry:
        add(registry, "edge-1")
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (path.stat().st_size - 4096))
    with pytest.raises(RegistryError, match=r"is damaged .*; put a backup in its place"):
        Registry.open(path).identities.all()


def test_a_sqlite_registry_without_room_stores_whole_reports_or_none(tmp_path: Path) -> None:
    with Registry.open(tmp_path / "registry.sqlite") as registry, no_room():
        registry.close()  # the next query connects anew, and the file cannot grow
        add(registry, "edge-1")
        number = num_until_full(registry)
    with Registry.open(tmp_path / "registry.sqlite") as registry:
        check_whole(registry, number)
        registry.stats.record_report("edge-1", report("later", session="later"))
        check_whole(registry, number + 1)


def test_a_migration_without_room_leaves_the_tables_of_the_earlier_version(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/registry.sqlite"
    make_old_registry(url, "0001")
    before = rows_of(url)
    with no_room(), pytest.raises(RegistryError, match="has no room for more"):
        Registry.open(url)
    assert rows_of(url) == before
    Registry.open(url).close()


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A folder on a disk of 16 MB for PostgreSQL; skip the test without the right to mount one."""
    folder = Path(tempfile.mkdtemp(prefix="fleet-disk-"))
    try:
        folder.chmod(0o755)
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder],
            capture_output=True,
            check=False,
        )
        if os.geteuid() != 0 or mounted.returncode:
            reason = "only root may mount a small disk"
            pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
        shutil.chown(folder, OWNER)
        yield folder
        subprocess.run(["umount", folder], check=True)
    finally:
        folder.rmdir()


def test_a_postgresql_registry_without_room_stores_whole_reports_or_none(
    postgresql: Databases, small_disk: Path
) -> None:
    server = postgresql.server
    with psycopg.connect(server.url("postgres"), autocommit=True) as connection:
        connection.execute(f"CREATE TABLESPACE small LOCATION '{small_disk}'")
        connection.execute("CREATE DATABASE small TEMPLATE template0 TABLESPACE small")
        try:
            with Registry.open(server.url("small")) as registry:
                add(registry, "edge-1")
                ballast = small_disk / "ballast"
                fill_up(ballast)
                number = num_until_full(registry)
                check_whole(registry, number)
                ballast.unlink()
                registry.stats.record_report("edge-1", report("later", session="later"))
                check_whole(registry, number + 1)
        finally:
            connection.execute("DROP DATABASE small WITH (FORCE)")
            connection.execute("DROP TABLESPACE small")


def fill_up(path: Path) -> None:
    """Write a file that fills the disk."""
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return


def test_a_registry_that_this_user_may_not_write_is_to_be_used_as_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "registry.sqlite"
    path.touch()
    url = database.parse_url(f"sqlite:///file:{path}?mode=ro&uri=true")
    engine = create_engine(url)
    message = r"cannot be written \(attempt to write a readonly database\); run this as the owner"
    with (
        pytest.raises(RegistryError, match=message),
        database.registry_errors(url),
        engine.begin() as connection,
    ):
        connection.execute(text("CREATE TABLE made (x)"))
    engine.dispose()
