"""Databases for tests: SQLite files, and databases of one PostgreSQL server a session."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from benchmarks.postgresql import PostgresqlServer, find_postgresql, postgresql_server
from fleet.errors import ConfigError
from fleet.registry.database import open_database

READY: Final = "ready"  # the template that has the registry's tables


class Databases:
    """Hands out databases of one server by their URLs."""

    def __init__(self, server: PostgresqlServer) -> None:
        self.server = server
        self._numbers = itertools.count(1)
        open_database(server.create(READY)).dispose()

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
    with databases.database() as url:
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
