"""Databases for tests: SQLite files, and databases of one PostgreSQL server a session."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import psycopg
import pytest

from benchmarks.postgresql import PostgresqlServer, find_postgresql, postgresql_server
from fleet.errors import ConfigError
from fleet.registry.database import open_database

READY: Final = "ready"  # the template that has the registry's tables
TABLES: Final = "SELECT tablename FROM pg_tables WHERE schemaname = 'public'"
SEQUENCES: Final = "SELECT sequencename, last_value FROM pg_sequences WHERE last_value IS NOT NULL"
DISCONNECT_OTHERS: Final = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid()
"""


class RestoredDatabase:
    """A database whose rows become again those that it had first, which `Databases` owns.

    To restore the rows takes a tenth of the time in which a database is created and dropped.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        with psycopg.connect(url) as connection:
            self._tables = [name for (name,) in connection.execute(TABLES)]
            connection.execute("CREATE SCHEMA kept")
            for name in self._tables:
                connection.execute(f'CREATE TABLE kept."{name}" AS TABLE public."{name}"')
            self._sequences = list(connection.execute(SEQUENCES))

    def restore(self) -> None:
        """Disconnect its clients and restore its rows and counters; fail if a table is missing."""
        with psycopg.connect(self.url) as connection:
            connection.execute(DISCONNECT_OTHERS)
            connection.execute("SET lock_timeout = '60s'")
            connection.execute("SET session_replication_role = replica")  # rows in any order
            names = ", ".join(f'public."{name}"' for name in self._tables)
            connection.execute(f"TRUNCATE {names} RESTART IDENTITY")
            for name in self._tables:
                connection.execute(f'INSERT INTO public."{name}" SELECT * FROM kept."{name}"')
            for sequence in self._sequences:
                connection.execute("SELECT setval(%s, %s)", sequence)


class Databases:
    """Hands out databases of one server by their URLs."""

    def __init__(self, server: PostgresqlServer) -> None:
        self.server = server
        self._numbers = itertools.count(1)
        self._restored: dict[str, RestoredDatabase] = {}
        open_database(server.create(READY)).dispose()

    @contextmanager
    def registry(self, template: str = READY) -> Iterator[str]:
        """The URL of a database as its template, for a test that changes no table itself."""
        if template not in self._restored:
            url = self.server.create(f"{template}-restored", template)
            self._restored[template] = RestoredDatabase(url)
        yield self._restored[template].url
        self._restored[template].restore()

    @contextmanager
    def database(self, *, empty: bool = False, template: str = READY) -> Iterator[str]:
        """The URL of a new database: a copy of `template`, or without tables if it is `empty`."""
        name = f"test-{next(self._numbers)}"
        yield self.server.create(name, "template0" if empty else template)
        self.server.drop(name)


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Databases]:
    """Skips without a server on this machine, except under CI, where that is a failure."""
    try:
        find_postgresql()
    except ConfigError as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(error))
    with postgresql_server() as server:
        yield Databases(server)


@pytest.fixture(scope="session")
def ready_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a SQLite file that has the registry's tables."""
    path = tmp_path_factory.mktemp(READY) / "registry.sqlite"
    open_database(path).dispose()
    return path


@pytest.fixture(params=["sqlite", "postgresql"])
def registry_url(
    request: pytest.FixtureRequest, tmp_path: Path, ready_sqlite: Path
) -> Iterator[str]:
    """Return the URL of a database that has the registry's tables, without any row."""
    if request.param == "sqlite":
        path = tmp_path / "registry.sqlite"
        shutil.copy(ready_sqlite, path)
        yield f"sqlite:///{path}"
        return
    databases: Databases = request.getfixturevalue("postgresql")
    with databases.registry() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database without any table."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/empty.sqlite"
        return
    databases: Databases = request.getfixturevalue("postgresql")
    with databases.database(empty=True) as url:
        yield url
