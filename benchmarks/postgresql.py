"""A PostgreSQL server of our own, in a temporary folder and on a free port of the loopback."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import psycopg

from fleet.errors import ConfigError
from fleet.utils.host_address import free_port

DEADLINE_S: Final = 60.0
HOST: Final = "127.0.0.1"
OWNER: Final = pwd.getpwuid(65534).pw_name  # the unprivileged user of Linux
INSTALLED: Final = Path("/usr/lib/postgresql")


class PostgresqlServer:
    """A server that starts when it is created.

    A process of root runs it as the user `OWNER`: the server refuses to run as root.
    """

    def __init__(self, folder: Path) -> None:
        self._bin = find_postgresql()
        self._data = folder / "data"
        self.port = free_port(HOST)
        self._as: dict[str, Any] = {}
        if os.geteuid() == 0:
            self._as = {"user": OWNER, "group": _group_of(OWNER), "extra_groups": []}
            shutil.chown(folder, OWNER)
        self._run(
            "initdb",
            "-D",
            str(self._data),
            "-U",
            "fleet",
            "--auth=trust",
            "--encoding=UTF8",
            "--no-sync",
        )
        self.start()

    def start(self) -> None:
        """Start the server and return when it responds.

        Raises:
            ConfigError: it does not within a minute.
        """
        log = (self._data.parent / "log").open("ab")
        self._process = subprocess.Popen(
            [
                self._bin / "postgres",
                "-D",
                self._data,
                "-h",
                HOST,
                "-p",
                str(self.port),
                "-k",
                self._data,
                "-c",
                "fsync=off",
                "-c",
                "max_connections=50",
            ],
            stdout=log,
            stderr=log,
            **self._as,
        )
        log.close()
        deadline = time.monotonic() + DEADLINE_S
        while True:
            try:
                psycopg.connect(self.url("postgres"), connect_timeout=5).close()
                return
            except psycopg.OperationalError as error:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    self.stop()
                    raise ConfigError(
                        f"PostgreSQL does not start: {error}; its log is {log.name}"
                    ) from None
                time.sleep(0.05)

    @property
    def pid(self) -> int:
        """The process whose children serve the connections."""
        return self._process.pid

    def stop(self) -> None:
        """End it with its connections; `start` restarts it with its data."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def url(self, database: str) -> str:
        return f"postgresql://fleet@{HOST}:{self.port}/{database}"

    def create(self, database: str, template: str = "template0") -> str:
        """Create a database, empty or as its template; return its URL."""
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{database}" TEMPLATE "{template}"')
        return self.url(database)

    def drop(self, database: str) -> None:
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(f'DROP DATABASE "{database}" WITH (FORCE)')

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [self._bin / program, *arguments],
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
            cwd="/",
            **self._as,
        )
        if done.returncode:
            raise ConfigError(f"{program} failed: {' '.join(done.stderr.split())}")


@contextmanager
def postgresql_server() -> Iterator[PostgresqlServer]:
    """Run a server in the block; remove its folder afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="fleet-postgresql-"))
    try:
        server = PostgresqlServer(folder)
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def find_postgresql() -> Path:
    """Return the folder of the newest installed server's programs, on PATH or in Debian's place.

    Raises:
        ConfigError: there is none.
    """
    if (program := shutil.which("postgres")) and (
        Path(program).resolve().parent / "initdb"
    ).exists():
        return Path(program).resolve().parent
    folders = [path.parent for path in INSTALLED.glob("*/bin/initdb")]
    if not folders:
        raise ConfigError(
            "no PostgreSQL server on this machine; scripts/install_postgresql.sh installs it"
        )
    return max(folders, key=lambda path: float(path.parent.name))


def _group_of(user: str) -> int:
    import pwd

    return pwd.getpwnam(user).pw_gid
