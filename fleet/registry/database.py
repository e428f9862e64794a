"""The registry's database, SQLite or PostgreSQL: opening it, and its migration."""

from __future__ import annotations

import logging
import os
import re
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import alembic.command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import Connection, Engine, create_engine, event, func, select
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DataError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.orm import Session

from fleet.errors import MissingExtraError, RegistryError, ValueRefusedError

BUSY_TIMEOUT_S: Final = 30.0
"""The wait of a write for a lock of another process: the SQLite file, or rows in PostgreSQL."""

QUERY_TIMEOUT_S: Final = 60.0
"""The time limit of PostgreSQL for one statement; a migration has none."""

RETRY_S: Final = 0.05
CONNECT_TIMEOUT_S: Final = 10
LOST_SERVER: Final = {
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60_000,
}
"""Options of libpq, in seconds and milliseconds: a connection to a silent server is closed."""

PRIMARY_CODE: Final = 0xFF
"""The bits of SQLite's extended error codes that are the primary code."""
LOCKED: Final = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, "55P03"})
FULL: Final = frozenset({sqlite3.SQLITE_FULL, "53100"})
SLOW: Final = "57014"
BROKEN: Final = frozenset({sqlite3.SQLITE_CORRUPT, "XX001", "XX002"})
MIGRATION_LOCK: Final = 0xCEC0_11A3
"""The advisory lock of a migration: several processes may open a new database at once."""

NO_PATH: Final = re.compile(
    r"\s*(?:(?:host|hostaddr|port|dbname|user|password|passfile|service|sslmode)\s*="
    r"|(?:postgres|postgresql|sqlite)(?:\+\w+)?:)"
)
"""The beginning of a connection string of libpq, or of a URL that lacks a slash."""

CONFIG_LOCK: Final = 0xCEC0_11A4
"""The advisory lock of a change to settings, which depends on the newest ones."""

ALARM_LOCK: Final = 0xCEC0_11A5
"""The advisory lock of a change to alarms: their events get ids in the order of their commits."""

logging.getLogger("alembic").setLevel(logging.WARNING)  # it logs every ordinary start


def open_database(url_or_path: str | Path) -> Engine:
    """Return an engine on the database, after its tables are created or migrated.

    Raises:
        RegistryError: the URL is malformed, the database cannot be reached, or a newer version of
            this program created it.
        MissingExtraError: the database's driver is not installed.
    """
    url = parse_url(url_or_path)
    with registry_errors(url):
        engine = connect_database(url)
        try:
            with writing(engine).begin() as connection:
                _migrate(connection)
        except BaseException:
            engine.dispose()
            raise
    return engine


def sqlite_file(url_or_path: str | Path) -> Path | None:
    """Return the file of a SQLite database, or None for another one. Raises RegistryError."""
    url = parse_url(url_or_path)
    return Path(url.database or "") if url.get_backend_name() == "sqlite" else None


def connect_database(url: URL) -> Engine:
    """Return an engine on an existing database, whose tables stay as they are."""
    return _sqlite(url) if url.get_backend_name() == "sqlite" else _postgresql(url)


def reading(engine: Engine) -> Engine:
    """Return the engine for reading transactions; each sees one snapshot, as in SQLite."""
    if engine.name == "sqlite":
        return engine
    return engine.execution_options(isolation_level="REPEATABLE READ")


def writing(engine: Engine) -> Engine:
    """Return the engine for writing transactions: SQLite waits for its lock at the start."""
    return engine.execution_options(sqlite_begin="IMMEDIATE")


@contextmanager
def registry_errors(url: URL) -> Iterator[None]:
    """Turn the errors of SQLAlchemy and Alembic into a RegistryError of one line."""
    shown = without_secrets(url)
    try:
        yield
    except DataError as error:
        raise ValueRefusedError(
            f"the registry {shown} does not accept a value: {_one_line(error.orig)}"
        ) from None
    except SQLAlchemyError as error:
        raise RegistryError(f"the registry {shown} {_explanation(error)}") from None
    except CommandError as error:
        raise RegistryError(
            f"the registry {shown} was made by another version ({error}); "
            "install that version or a newer one"
        ) from None


def without_secrets(url: URL) -> str:
    """Return a URL without its password and without its parameters, which may hold one."""
    return url.set(query={}).render_as_string(hide_password=True)


def _explanation(error: SQLAlchemyError) -> str:
    """Return the database's reason, and the advice on it."""
    first = _first_error(error)
    cause = getattr(first, "orig", None) or first
    code = getattr(cause, "sqlstate", None) or getattr(cause, "sqlite_errorcode", 0) & PRIMARY_CODE
    reason = _one_line(cause)
    if code in LOCKED:
        advice = "end the process that holds it, or try again"
        return f"was locked for {BUSY_TIMEOUT_S:g} s ({reason}); {advice}"
    if code == SLOW:
        advice = "query less, or find out why it is busy"
        return f"worked for {QUERY_TIMEOUT_S:g} s on one query ({reason}); {advice}"
    if code in FULL:
        advice = "free some on its disk: nothing of this change is stored"
        return f"has no room for more ({reason}); {advice}"
    if code == sqlite3.SQLITE_IOERR:
        return f"cannot use its disk ({reason}); check whether it is full or broken"
    if code == sqlite3.SQLITE_READONLY:
        return f"cannot be written ({reason}); run this as the owner of its folder"
    if code in BROKEN:
        return f"is damaged ({reason}); put a backup in its place"
    return f"is not available: {reason}; check its path or URL"


def _first_error(error: BaseException) -> BaseException:
    """Return the error that ended the transaction.

    SQLite ends a transaction by itself when its disk is full; then the rollback of a savepoint,
    which exists no more, fails as well.
    """
    first: BaseException = error
    context = error.__context__
    while "no such savepoint" in str(first) and context is not None:
        if isinstance(context, SQLAlchemyError):
            first = context
        context = context.__context__
    return first


def acquire_lock(db: Session, lock: int) -> None:
    """Hold `lock` until the end of the transaction.

    SQLite needs no lock: it runs one writing transaction at a time.
    """
    if db.get_bind().dialect.name == "postgresql":
        db.execute(select(func.pg_advisory_xact_lock(lock)))


def _one_line(error: BaseException | None) -> str:
    return " ".join(str(error).split())


def alembic_config() -> Config:
    """Return Alembic's configuration, with the migrations in this package."""
    config = Config()
    config.set_main_option("script_location", "fleet.registry:migrations")
    config.set_main_option("path_separator", "os")
    return config


def parse_url(url_or_path: str | Path) -> URL:
    """Return the SQLAlchemy URL of a database, or of a SQLite file.

    Raises:
        RegistryError: it is malformed, or of another kind of database.
    """
    if isinstance(url_or_path, Path) or "://" not in url_or_path:
        if NO_PATH.match(str(url_or_path)):  # its password would be in a file's name
            raise RegistryError(
                "the registry is neither a path nor a URL, but looks like libpq's 'host=... "
                "dbname=...' or a URL without '//'; give postgresql://USER@HOST/DATABASE"
            )
        return URL.create("sqlite", database=str(Path(url_or_path).absolute()))
    try:
        url = make_url(url_or_path)
    except (ArgumentError, ValueError):
        raise RegistryError(
            "the registry's URL is malformed: "
            "expected a path or a URL like postgresql://user@host/fleet"
        ) from None
    if url.host and "@" in f"{url.host}{url.database}":  # the password would be printed
        raise RegistryError(
            "the registry's URL has more than one @; write an @ in the user's name or password as "
            "%40, and a % as %25"
        )
    if url.drivername in ("postgres", "postgresql"):
        url = url.set(drivername="postgresql+psycopg")
    if url.get_backend_name() not in ("sqlite", "postgresql"):
        raise RegistryError(
            f"no such kind of registry: {url.drivername!r}; expected sqlite or postgresql"
        )
    return url


def _create(url: URL, **options: Any) -> Engine:
    try:
        return create_engine(url, pool_pre_ping=True, **options)
    except NoSuchModuleError:
        raise RegistryError(
            f"no such driver: {url.drivername!r}; expected sqlite or postgresql"
        ) from None
    except ImportError as error:
        package = "'cecollm-fleet[postgres]'" if error.name == "psycopg" else error.name
        raise MissingExtraError(
            f"the registry {without_secrets(url)} needs the driver {error.name}, which is not "
            f"installed; run: pip install {package}"
        ) from None


def _postgresql(url: URL) -> Engine:
    engine = _create(url, connect_args={"connect_timeout": CONNECT_TIMEOUT_S, **LOST_SERVER})

    @event.listens_for(engine, "connect")
    def connected(connection: Any, _: object) -> None:
        connection.execute(f"SET lock_timeout = {round(1000 * BUSY_TIMEOUT_S)}")
        connection.execute(f"SET statement_timeout = {round(1000 * QUERY_TIMEOUT_S)}")
        connection.commit()

    return engine


class _SqliteFile:
    """The file of a SQLite registry, which must stay the one that was opened."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._opened: tuple[int, int] | None = None

    def check(self) -> None:
        """Raise RegistryError if the file was removed or replaced by another one.

        SQLite would write into the deleted file, or into a new one.
        """
        try:
            status = self._path.stat()
            file = (status.st_dev, status.st_ino)
        except OSError:
            file = None
        if self._opened and file != self._opened:
            reason = (
                "another file is in its place; start again to use that"
                if file
                else "its file is gone; put it back"
            )
            raise RegistryError(f"the registry {self._path} is not available: {reason}")
        self._opened = file


def use_wal(connection: sqlite3.Connection) -> None:
    """Switch to write-ahead logging, which lets other processes read during a write.

    SQLite does not wait by itself when another process, which has just created the file as well,
    switches at the same time.
    """
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            is_locked = error.sqlite_errorcode & PRIMARY_CODE in LOCKED
            if not is_locked or time.monotonic() >= deadline:
                raise
            time.sleep(RETRY_S)


def _sqlite(url: URL) -> Engine:
    file = None
    if url.database and url.database != ":memory:":
        path = Path(url.database)
        _make_folder(path.parent)
        make_private(path)
        file = _SqliteFile(path)
    engine = _create(url, connect_args={"timeout": BUSY_TIMEOUT_S})

    @event.listens_for(engine, "do_connect")
    def connecting(*_: object) -> None:
        if file:
            file.check()

    @event.listens_for(engine, "connect")
    def connected(connection: sqlite3.Connection, _: object) -> None:
        connection.isolation_level = None  # the "begin" event below starts transactions
        use_wal(connection)
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.execute("PRAGMA foreign_keys=ON")

    @event.listens_for(engine, "begin")
    def begun(connection: Connection) -> None:
        if file:
            file.check()
        kind = connection.get_execution_options().get("sqlite_begin", "DEFERRED")
        connection.exec_driver_sql(f"BEGIN {kind}")

    return engine


def make_private(path: Path) -> None:
    """Let only its owner read a SQLite file and those next to it (mode 0600); create the file.

    SQLite gives the files that it creates later the same mode.
    """
    # Only a new file is opened: closing one that this process has open would drop SQLite's locks.
    with suppress(OSError):  # SQLite reports what is wrong
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    for each in (path, *(path.with_name(path.name + suffix) for suffix in ("-wal", "-shm"))):
        with suppress(OSError):
            each.chmod(0o600)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RegistryError(
            f"cannot make the registry's folder {folder}: {error.strerror}"
        ) from None


def _migrate(connection: Connection) -> None:
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
        connection.execute(select(func.pg_advisory_xact_lock(MIGRATION_LOCK)))
    config = alembic_config()
    config.attributes["connection"] = connection
    alembic.command.upgrade(config, "head")
