"""Copies of the registry's database in one file, made while the database is in use."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path
from typing import Final

from sqlalchemy import inspect
from sqlalchemy.engine import URL

from fleet.errors import ConfigError, RegistryError
from fleet.registry.database import (
    connect_database,
    parse_url,
    registry_errors,
    without_secrets,
)

POSTGRESQL_FOLDER: Final = Path("/usr/lib/postgresql")


def dump_registry(url_or_path: str | Path, out: Path) -> None:
    """Copy the database into the new file `out`: SQLite's backup, or the output of `pg_dump`.

    Raises:
        RegistryError: the database cannot be read, or `pg_dump` failed.
        ConfigError: `pg_dump` is not installed.
    """
    url = parse_url(url_or_path)
    if url.get_backend_name() == "sqlite":
        _copy_sqlite(Path(url.database or ""), out)
    else:
        _run_client("pg_dump", url, "--format=custom", f"--file={out}", _conninfo(url))


def load_registry(dump: Path, url_or_path: str | Path) -> None:
    """Load a file of `dump_registry` into an empty database.

    Raises:
        RegistryError: the file is damaged, the database is not empty, or cannot be reached.
        ConfigError: `pg_restore` is not installed.
    """
    url = parse_url(url_or_path)
    if url.get_backend_name() == "sqlite":
        _copy_sqlite(dump, Path(url.database or ""))
        return
    _check_empty(url)
    options = ("--no-owner", "--exit-on-error", "--single-transaction")
    _run_client("pg_restore", url, *options, f"--dbname={_conninfo(url)}", str(dump))


def _copy_sqlite(source: Path, target: Path) -> None:
    if not source.is_file() or not source.stat().st_size:
        raise RegistryError(
            f"the registry {source} is missing or empty; put it back, or check --home"
        )
    try:
        with (
            closing(sqlite3.connect(source)) as reader,
            closing(sqlite3.connect(target)) as writer,
        ):
            reader.backup(writer)
            problems = writer.execute("PRAGMA quick_check(1)").fetchone()[0]
    except sqlite3.Error as error:
        raise RegistryError(f"cannot copy the registry {source} to {target}: {error}") from None
    if problems != "ok":
        raise RegistryError(f"the registry {source} is damaged: {problems}; use an older backup")


def _check_empty(url: URL) -> None:
    with registry_errors(url):
        engine = connect_database(url)
        try:
            tables = inspect(engine).get_table_names()
        finally:
            engine.dispose()
    if tables:
        raise RegistryError(
            f"the registry {without_secrets(url)} is not empty ({len(tables)} tables); "
            "create a new database (createdb), and name it with --registry"
        )


def _conninfo(url: URL) -> str:
    """Return the URL for libpq, without the password: any user can list a command's arguments."""
    url = url.set(drivername="postgresql", password=None)
    return url.difference_update_query(["password"]).render_as_string()


def _run_client(program: str, url: URL, *arguments: str) -> None:
    """Run a program of PostgreSQL; its first error is that of a RegistryError."""
    environment = dict(os.environ)
    if password := url.password or url.query.get("password"):
        environment["PGPASSWORD"] = str(password)
    done = subprocess.run(
        [_find_client(program), "--no-password", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        shown = without_secrets(url)
        reason = " ".join(done.stderr.split()) or f"exit status {done.returncode}"
        raise RegistryError(f"{program} failed on the registry {shown}: {reason[:500]}")


def _find_client(program: str) -> str:
    """Return the path of a program on PATH, or of the newest version in Debian's folder."""
    found = shutil.which(program)
    if found:
        return found
    versions = sorted(POSTGRESQL_FOLDER.glob(f"*/bin/{program}"), key=_version_of)
    if not versions:
        raise ConfigError(
            f"{program} is not installed, and the registry is on PostgreSQL; "
            "install it: apt-get install postgresql-client"
        )
    return str(versions[-1])


def _version_of(program: Path) -> float:
    return float(program.parents[1].name)
