"""Opening the registry's database, SQLite or PostgreSQL, and bringing it to the newest tables."""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
"""How long a write waits for what another process has locked: the SQLite file, or rows in PostgreSQL."""

QUERY_TIMEOUT_S: Final = 60.0
"""How long PostgreSQL works on one statement; a migration may take longer."""

RETRY_S: Final = 0.05
CONNECT_TIMEOUT_S: Final = 10
LOST_SERVER: Final = {
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60_000,
}
"""By libpq's names, in seconds and milliseconds: a connection whose server says nothing at all ends after a minute."""

PRIMARY_CODE: Final = 0xFF  # of SQLite's extended ones
LOCKED: Final = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, "55P03"})
FULL: Final = frozenset({sqlite3.SQLITE_FULL, "53100"})
SLOW: Final = "57014"
BROKEN: Final = frozenset({sqlite3.SQLITE_CORRUPT, "XX001", "XX002"})
MIGRATION_LOCK: Final = 0xCEC0_11A3
"""PostgreSQL's advisory lock for whoever migrates: several processes may open a new database at once."""

CONFIG_LOCK: Final = 0xCEC0_11A4
"""And for whoever changes settings: a change is made of what was said last."""

logging.getLogger("alembic").setLevel(logging.WARNING)  # an ordinary start is no news


def open_database(url_or_path: str | Path) -> Engine:
    """An engine on the database, whose tables are made or migrated first. For `reading(engine)` or `writing(engine)`.

    Raises:
        RegistryError: the URL is none, the database cannot be reached, or a newer version of this program made it.
        MissingExtraError: the database's driver is not installed.
    """
    url = parse_url(url_or_path)
    with registry_errors(url):
        engine = _sqlite(url) if url.get_backend_name() == "sqlite" else _postgresql(url)
        try:
            with writing(engine).begin() as connection:
                _migrate(connection)
        except BaseException:
            engine.dispose()
            raise
    return engine


def reading(engine: Engine) -> Engine:
    """The same engine for transactions that read: all their questions see one moment, as they do in SQLite anyway."""
    return (
        engine
        if engine.name == "sqlite"
        else engine.execution_options(isolation_level="REPEATABLE READ")
    )


def writing(engine: Engine) -> Engine:
    """The same engine for transactions that write: SQLite then waits for its lock at the start, not in the middle."""
    return engine.execution_options(sqlite_begin="IMMEDIATE")


@contextmanager
def registry_errors(url: URL) -> Iterator[None]:
    """Turns what SQLAlchemy and Alembic raise into a RegistryError of one line."""
    shown = url.render_as_string(hide_password=True)
    try:
        yield
    except DataError as error:
        raise ValueRefusedError(
            f"the registry {shown} does not take a value: {_one_line(error.orig)}"
        ) from None
    except SQLAlchemyError as error:
        raise RegistryError(f"the registry {shown} {_what_failed(error)}") from None
    except CommandError as error:
        raise RegistryError(
            f"the registry {shown} was made by another version ({error}); install that version or a newer one"
        ) from None


def _what_failed(error: SQLAlchemyError) -> str:
    """What the database says, and what to do about it."""
    cause = getattr(error, "orig", None) or error
    code = getattr(cause, "sqlstate", None) or getattr(cause, "sqlite_errorcode", 0) & PRIMARY_CODE
    reason = _one_line(cause)
    if code in LOCKED:
        return f"was locked for {BUSY_TIMEOUT_S:g} s ({reason}); end the process that holds it, or try again"
    if code == SLOW:
        return f"worked for {QUERY_TIMEOUT_S:g} s on one question ({reason}); ask for less, or see what keeps it busy"
    if code in FULL:
        return f"has no room for more ({reason}); free some on its disk: nothing of this change is stored"
    if code == sqlite3.SQLITE_IOERR:
        return f"cannot use its disk ({reason}); see whether that is full or broken"
    if code in BROKEN:
        return f"is damaged ({reason}); put a backup in its place"
    return f"cannot answer: {reason}; check its path or URL"


def take_turns(db: Session, lock: int) -> None:
    """Until the transaction's end nobody else has `lock`; in SQLite transactions that write take turns anyway."""
    if db.get_bind().dialect.name == "postgresql":
        db.execute(select(func.pg_advisory_xact_lock(lock)))


def _one_line(error: BaseException | None) -> str:
    return " ".join(str(error).split())


def alembic_config() -> Config:
    """Alembic's configuration, with the migrations that are in this package."""
    config = Config()
    config.set_main_option("script_location", "fleet.registry:migrations")
    config.set_main_option("path_separator", "os")
    return config


def parse_url(url_or_path: str | Path) -> URL:
    if isinstance(url_or_path, str) and "://" in url_or_path:
        try:
            url = make_url(url_or_path)
        except (ArgumentError, ValueError):
            raise RegistryError(
                "the registry's URL is none: expected a path or a URL like postgresql://user@host/fleet"
            ) from None
        if url.drivername in ("postgres", "postgresql"):
            url = url.set(drivername="postgresql+psycopg")
        if url.get_backend_name() not in ("sqlite", "postgresql"):
            raise RegistryError(
                f"no such kind of registry: {url.drivername!r}; expected sqlite or postgresql"
            )
        return url
    return URL.create("sqlite", database=str(Path(url_or_path).absolute()))


def _create(url: URL, **options: Any) -> Engine:
    try:
        return create_engine(url, pool_pre_ping=True, **options)
    except NoSuchModuleError:
        raise RegistryError(
            f"no such driver: {url.drivername!r}; expected sqlite or postgresql"
        ) from None
    except ImportError as error:
        wanted = "'cecollm-fleet[postgres]'" if error.name == "psycopg" else error.name
        raise MissingExtraError(
            f"the registry {url.render_as_string(hide_password=True)} needs the driver {error.name}, "
            f"which is not installed; run: pip install {wanted}"
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
    """The file of a SQLite registry: the one that was opened, or no other."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._opened: tuple[int, int] | None = None

    def check(self) -> None:
        """Raises RegistryError when it is gone, or another is in its place: SQLite would write where nobody reads, or
        into a new file."""
        try:
            status = self._path.stat()
            found = status.st_dev, status.st_ino
        except OSError:
            found = None
        if self._opened and found != self._opened:
            what = (
                "another file is in its place; start again to use that"
                if found
                else "its file is gone; put it back"
            )
            raise RegistryError(f"the registry {self._path} cannot answer: {what}")
        self._opened = found


def use_wal(connection: sqlite3.Connection) -> None:
    """Write-ahead logging, which lets others read. SQLite does not wait by itself when another process changes it, too:
    both have just made the file."""
    give_up_at = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if (
                error.sqlite_errorcode & PRIMARY_CODE not in LOCKED
                or time.monotonic() >= give_up_at
            ):
                raise
            time.sleep(RETRY_S)


def _sqlite(url: URL) -> Engine:
    if url.database and url.database != ":memory:":
        folder = Path(url.database).parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RegistryError(
                f"cannot make the registry's folder {folder}: {error.strerror}"
            ) from None
    engine = _create(url, connect_args={"timeout": BUSY_TIMEOUT_S})
    file = _SqliteFile(Path(url.database)) if url.database and url.database != ":memory:" else None

    @event.listens_for(engine, "do_connect")
    def connecting(*_: object) -> None:
        if file:
            file.check()

    @event.listens_for(engine, "connect")
    def connected(connection: sqlite3.Connection, _: object) -> None:
        connection.isolation_level = None  # "begin" below says how a transaction starts
        use_wal(connection)
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.execute("PRAGMA foreign_keys=ON")

    @event.listens_for(engine, "begin")
    def begun(connection: Connection) -> None:
        if file:
            file.check()
        connection.exec_driver_sql(
            f"BEGIN {connection.get_execution_options().get('sqlite_begin', 'DEFERRED')}"
        )

    return engine


def _migrate(connection: Connection) -> None:
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
        connection.execute(select(func.pg_advisory_xact_lock(MIGRATION_LOCK)))
    config = alembic_config()
    config.attributes["connection"] = connection
    alembic.command.upgrade(config, "head")
