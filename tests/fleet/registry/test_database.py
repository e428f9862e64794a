"""Opening empty, old, newer, shared and unusable databases."""

from __future__ import annotations

import multiprocessing
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.synchronize import Barrier
from pathlib import Path

import msgspec
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import text

from fleet.errors import MissingExtraError, RegistryError
from fleet.registry.database import alembic_config, open_database, use_wal
from fleet.registry.stats.rollup_tables import ROLLUPS
from fleet.registry.store import Registry
from fleet.server.fleet_options import FleetOptions, resolve_config
from tests.fleet.conftest import add, report
from tests.fleet.registry.old_versions import NOW, make_old_registry, old_report, rows_of

WAIT_S = 60


def test_migrations_from_empty_give_the_tables_of_the_models(empty_url: str) -> None:
    engine = open_database(empty_url)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), ROLLUPS.metadata) == []
    engine.dispose()


def test_there_is_one_newest_migration() -> None:
    assert len(ScriptDirectory.from_config(alembic_config()).get_heads()) == 1


def test_a_registry_of_the_first_version_keeps_its_counts_and_gets_roll_ups(empty_url: str) -> None:
    make_old_registry(empty_url, "0001")
    with Registry.open(empty_url) as registry:
        assert "edge-1" in {row.name for row in registry.identities.all()}
        (row,) = registry.stats.per_device("edge-1", now=NOW)
        add(registry, "twin", group="north")
        for i in range(20):
            registry.stats.record_report("twin", old_report(i))
        as_if_new = registry.stats.per_device("twin", now=NOW)[0]
        assert (row.generations, row.tokens, row.sources["cloud"]) == (20, 200, 40)
        assert (
            msgspec.structs.replace(row, device="twin", online=False, last_seen=None) == as_if_new
        )
        assert registry.stats.per_device("edge-1", NOW - 7200, now=NOW)[0].generations == 2
        assert not registry.stats.record_report("edge-1", old_report(0))


@pytest.mark.parametrize(
    "registry",
    [
        "host=127.0.0.1 dbname=f password=secret",
        " password = secret",
        "postgresql:fleet:secret@host/f",
        "sqlite:/srv/secret",
    ],
)
def test_a_registry_that_is_neither_a_url_nor_a_path_is_refused_and_not_shown(
    registry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in (
        Registry.open,
        lambda text: resolve_config(tmp_path, FleetOptions(registry=text)),
    ):
        with pytest.raises(RegistryError, match="neither a path nor a URL") as raised:
            command(registry)
        assert "secret" not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_a_registry_keeps_its_rows_when_it_is_opened_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "registry.sqlite"
    with Registry.open(path) as registry:
        add(registry, "edge-1")
        registry.stats.record_report("edge-1", report())
    with Registry.open(f"sqlite:///{path}") as registry:
        assert registry.stats.per_device("edge-1")[0].tokens == 10


def test_a_registry_of_a_newer_version_is_left_alone(empty_url: str) -> None:
    engine = open_database(empty_url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = 'later'"))
    engine.dispose()
    with pytest.raises(RegistryError, match="made by another version"):
        Registry.open(empty_url)
    (row,) = rows_of(empty_url)["alembic_version"]
    assert row["version_num"] == "later"


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("nothing://host/db", "no such kind of registry: 'nothing'; expected sqlite or postgresql"),
        ("postgresql://me:secret@127.0.0.1:1/fleet", "is not available: .*refused"),
        ("://", "expected a path or a URL"),
        ("postgresql://u:p@ss%/secret@127.0.0.1:1/fleet", "more than one @; write an @ .* as %40"),
        ("postgresql://u:p@secret@127.0.0.1:1/fleet", "more than one @|malformed"),
        ("postgresql://u@127.0.0.1:1/fleet?password=secret", "is not available: .*refused"),
        ("postgresql+psycopg2://me:secret@127.0.0.1:1/fleet", r"psycopg2|is not available"),
        ("sqlite:////proc/none/registry.sqlite", "cannot"),
    ],
)
def test_a_url_that_cannot_be_used_gives_one_line_without_its_password(url: str, says: str) -> None:
    with pytest.raises((RegistryError, MissingExtraError), match=says) as raised:
        Registry.open(url)
    assert "\n" not in str(raised.value)
    assert "secret" not in str(raised.value)


def test_a_file_that_is_no_database_gives_one_line(tmp_path: Path) -> None:
    path = tmp_path / "registry.sqlite"
    path.write_bytes(b"this is a shopping list, and it goes on for a while" * 20)
    with pytest.raises(RegistryError, match="file is not a database") as raised:
        Registry.open(path)
    assert "\n" not in str(raised.value)


def _write_reports(url: str, writer: int, number: int, ready: Barrier) -> None:
    ready.wait(WAIT_S)
    with Registry.open(url) as registry:
        for i in range(number):
            registry.stats.record_report("edge-1", report(f"g{writer}-{i}", session=f"s{i}"))
            registry.stats.record_report("edge-1", report(f"both-{i}", session=f"s{i}"))


def test_processes_that_write_at_once_lose_nothing_and_count_nothing_twice(
    registry_url: str,
) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(3)
    writers = [
        context.Process(target=_write_reports, args=(registry_url, writer, 20, ready))
        for writer in (1, 2)
    ]
    with Registry.open(registry_url) as registry:
        add(registry, "edge-1")
        for process in writers:
            process.start()
        ready.wait(WAIT_S)
        for process in writers:
            process.join(WAIT_S)
        assert [process.exitcode for process in writers] == [0, 0]
        (row,) = registry.stats.per_device()
        assert (row.generations, row.tokens, len(registry.stats.sessions())) == (60, 600, 20)


def _open(url: str, ready: Barrier) -> None:
    ready.wait(WAIT_S)
    Registry.open(url).close()


def test_processes_that_open_a_new_registry_at_once_make_it_once(empty_url: str) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(3)
    openers = [context.Process(target=_open, args=(empty_url, ready)) for _ in range(3)]
    for process in openers:
        process.start()
    for process in openers:
        process.join(WAIT_S)
    assert [process.exitcode for process in openers] == [0, 0, 0]


def test_processes_that_open_a_new_file_at_once_change_its_journal_once(tmp_path: Path) -> None:
    """SQLite alone refuses about one in 25 of these as locked."""

    def connect(path: Path, ready: threading.Barrier) -> str:
        connection = sqlite3.connect(path, isolation_level=None)
        ready.wait(WAIT_S)
        use_wal(connection)
        (mode,) = connection.execute("PRAGMA journal_mode").fetchone()
        connection.close()
        return str(mode)

    with ThreadPoolExecutor(6) as pool:
        for number in range(50):
            ready = threading.Barrier(6)
            met = [pool.submit(connect, tmp_path / f"{number}.sqlite", ready) for _ in range(6)]
            assert [future.result(WAIT_S) for future in met] == ["wal"] * 6


@pytest.mark.parametrize("exists", [False, True])
def test_only_the_owner_reads_a_sqlite_registry_and_the_files_next_to_it(
    tmp_path: Path, *, exists: bool
) -> None:
    path = tmp_path / "registry.sqlite"
    if exists:
        Registry.open(path).close()
        path.chmod(0o644)
    with Registry.open(path) as registry:
        add(registry, "edge-1")
        modes = {each.name: each.stat().st_mode & 0o777 for each in tmp_path.iterdir()}
    assert modes == dict.fromkeys(
        ("registry.sqlite", "registry.sqlite-wal", "registry.sqlite-shm"), 0o600
    )
