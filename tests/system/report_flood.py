"""Many devices report to one server, which is killed twice, and whose database is away in between.

SQLite's file is locked by another process, PostgreSQL's server is stopped. At its full size:
``python -m tests.system.report_flood --devices 200 --reports 50000 --away-s 20 [--postgresql]``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Final

from sqlalchemy import create_engine, func, select

from benchmarks.postgresql import PostgresqlServer, postgresql_server
from edge_agent.reporting.report_outbox import REPORTS_FILE, ReportOutbox
from fleet.protocol.access import Role
from fleet.registry.database import parse_url
from fleet.registry.models import GenerationRecord
from fleet.server.child_process import Child
from fleet.server.home import FleetConfig, FleetHome
from provisioning.authority import CertificateAuthority
from tests.brokers import HOST, free_port, wait_until
from tests.identities import enroll_identity

WAIT_S: Final = 240.0
DEVICES_A_PROCESS: Final = (
    50  # paho's select() takes no file number beyond 1023, and a device has six files
)
TOKENS_A_REPORT: Final = 10
LOCK: Final = """
import sqlite3, sys
database = sqlite3.connect(sys.argv[1], 30, isolation_level=None)
database.execute("BEGIN EXCLUSIVE")
print("locked", flush=True)
sys.stdin.read()
"""


class Flood:
    """A server in a process of its own, and devices in a few others."""

    def __init__(
        self, folder: Path, num_devices: int, postgresql: PostgresqlServer | None, stack: ExitStack
    ) -> None:
        url = postgresql.create("flood") if postgresql else None
        config = FleetConfig(
            host=HOST, port=free_port(), bundle=str(folder), registry=url, service_port=0
        )
        self.home = FleetHome.create(folder / "state", config)
        self._file = self.home.folder / "registry.sqlite"
        self._postgresql = postgresql
        self.registry = stack.enter_context(self.home.registry())
        self._engine = create_engine(parse_url(url or self._file), pool_pre_ping=True)
        stack.callback(self._engine.dispose)
        self.server = self._start_server()
        stack.callback(lambda: self.server.stop())
        authority = CertificateAuthority.load(self.home.folder / "ca")
        self.folders = [folder / f"d{i}" for i in range(num_devices)]
        for each in self.folders:
            port = self.home.config.port
            enroll_identity(
                self.registry, authority, each.name, Role.DEVICE, each, host=HOST, port=port
            )
        self._processes = [
            stack.enter_context(
                process(
                    "-m",
                    "tests.system.reporting_devices",
                    *map(str, self.folders[i::num_processes]),
                )
            )
            for num_processes in [-(-num_devices // DEVICES_A_PROCESS)]
            for i in range(num_processes)
        ]
        for devices in self._processes:
            expect(devices, "ready")

    def restart_server(self, meanwhile: Callable[[], None]) -> None:
        """Kills it, and starts it again after `meanwhile`."""
        self.server.process.kill()
        self.server.process.wait()
        meanwhile()
        self.server = self._start_server()

    def _start_server(self) -> Child:
        server = Child("the server", ("fleet.cli", "server", "--home", str(self.home.folder)))
        server.wait_ready()
        return server

    def report(self, count: int) -> None:
        """Every device makes `count` reports."""
        for devices in self._processes:
            assert devices.stdin
            devices.stdin.write(f"{count}\n")
            devices.stdin.flush()

    @contextmanager
    def database_away(self) -> Iterator[None]:
        """Another process has the file to itself, or the database's server is stopped."""
        if self._postgresql:
            self._postgresql.stop()
            yield
            self._postgresql.start()
            return
        with process("-c", LOCK, str(self._file)) as holder:
            expect(holder, "locked")
            yield

    def num_stored(self) -> int:
        with self._engine.connect() as database:
            return database.scalar(select(func.count()).select_from(GenerationRecord)) or 0

    def until_stored(self, count: int) -> None:
        wait_until(lambda: self.num_stored() >= count, f"{count} reports are stored", WAIT_S)

    def generations(self) -> list[str]:
        """Return the rows of the registry's table."""
        with self._engine.connect() as database:
            return sorted(database.scalars(select(GenerationRecord.generation)))


def flood(
    folder: Path,
    num_devices: int,
    num_reports: int,
    away_s: float,
    postgresql: PostgresqlServer | None = None,
) -> None:
    """Fail unless the registry has each report exactly once and no device keeps one."""
    each = num_reports // num_devices
    began = time.monotonic()

    def say(what: str) -> None:
        print(
            f"{time.monotonic() - began:6.1f} s  {fleet.num_stored():6d} stored  {what}", flush=True
        )

    with ExitStack() as stack:
        fleet = Flood(folder, num_devices, postgresql, stack)
        say("devices are connected")
        fleet.report(each // 3)
        fleet.until_stored(num_reports // 10)
        say("the server is killed")
        fleet.restart_server(lambda: fleet.report(each // 3))
        fleet.until_stored(num_reports * 4 // 10)
        say("the database is away")
        with fleet.database_away():
            fleet.report(each - 2 * (each // 3))
            time.sleep(away_s)
        fleet.until_stored(num_reports * 6 // 10)
        say("the server is killed")
        fleet.restart_server(lambda: None)
        say("the server is back")
        fleet.until_stored(num_reports)
        say("all are stored")
        wait_until(
            lambda: not any(map(num_kept, fleet.folders)), "no device keeps a report", WAIT_S
        )
        say("all are acknowledged")
        assert fleet.generations() == sorted(
            f"{it.name}-{i + 1}" for it in fleet.folders for i in range(each)
        )
        counted = {(row.generations, row.tokens) for row in fleet.registry.stats.per_device()}
        assert counted == {(each, each * TOKENS_A_REPORT)}


def num_kept(folder: Path) -> int:
    outbox = ReportOutbox(folder / REPORTS_FILE, limit=10_000)
    with outbox.transaction():
        count = len(outbox)
    outbox.close()
    return count


@contextmanager
def process(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Python with `arguments`, for the length of the block."""
    command = [sys.executable, *arguments]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as running:
        yield running
        running.terminate()


def expect(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout
    assert process.stdout.readline().strip() == line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=200)
    parser.add_argument("--reports", type=int, default=50_000)
    parser.add_argument("--away-s", type=float, default=20.0)
    parser.add_argument("--postgresql", action="store_true")
    asked = parser.parse_args()
    database: AbstractContextManager[PostgresqlServer | None] = (
        postgresql_server() if asked.postgresql else nullcontext()
    )
    with tempfile.TemporaryDirectory() as folder, database as server:
        flood(Path(folder), asked.devices, asked.reports, asked.away_s, server)


if __name__ == "__main__":
    main()
