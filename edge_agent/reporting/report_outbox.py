"""The outbox: reports that the collector has not acknowledged yet, on disk."""

from __future__ import annotations

import os
import sqlite3
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

from edge_agent.reporting.report_merge import merge_reports
from fleet.errors import ProtocolError
from fleet.protocol.report import GenerationReport, decode_report, encode_report
from fleet.utils.atomic_files import move_aside

REPORTS_FILE: Final = "reports.sqlite"
SIDE_FILES: Final = ("-wal", "-shm")
BUSY_S: Final = 5.0  # another agent on the same folder writes for milliseconds
SPARE_SHARE: Final = 10  # a tenth of the limit is freed at a time

SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS reports (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    generation TEXT NOT NULL UNIQUE,
    sent INTEGER NOT NULL,
    payload BLOB NOT NULL
)
"""
INSERT: Final = "INSERT OR IGNORE INTO reports (generation, sent, payload) VALUES (?, ?, ?)"


class StoredReport(NamedTuple):
    """One report; later ones have a larger `id`."""

    id: int
    generation: str
    payload: bytes


class ReportOutbox:
    """At most `limit` reports, in order, in a SQLite file; for one thread.

    The file survives a crash and a power failure; several processes may share it. Beyond the limit
    the oldest reports are merged. A report that was sent once is never changed: the registry may
    have counted it, and recognises it by its generation alone.
    """

    def __init__(self, path: Path | None, limit: int) -> None:
        """Open the file at the first transaction; with `path` None keep the reports in memory."""
        self._path = path
        self._limit = limit
        self._database: sqlite3.Connection | None = None

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Open a transaction; every method below needs one.

        Raises:
            sqlite3.Error, OSError: the file cannot be used. The next transaction opens it anew.
        """
        try:
            database = self._database or self._open()
            self._database = database
            database.execute("BEGIN IMMEDIATE")
            yield
            database.execute("COMMIT")
        except BaseException:
            if self._path:
                self.close()
            elif self._database:
                self._database.rollback()
            raise

    def close(self) -> None:
        if self._database:
            self._database.close()
            self._database = None

    def explain(self, error: Exception) -> str:
        """Return one line about an error of a transaction."""
        return (
            f"reports cannot be kept in {self._path} ({error}): make room, or remove the file; "
            "until then they are sent from memory"
        )

    def add(self, payloads: Mapping[str, bytes], *, sent: bool = False) -> None:
        """Add reports by generation, with `sent` as sent already; one that is there stays."""
        rows = [(generation, sent, payload) for generation, payload in payloads.items()]
        self._connection.executemany(INSERT, rows)
        if rows and (excess := len(self) - self._limit) > 0:
            self._merge_oldest(excess + self._limit // SPARE_SHARE)

    def remove(self, generations: Iterable[str]) -> None:
        """Remove reports by generation."""
        rows = [(generation,) for generation in generations]
        self._connection.executemany("DELETE FROM reports WHERE generation = ?", rows)

    def take(self, after: int, count: int) -> list[StoredReport]:
        """Return the first `count` reports after the id `after`, and mark them as sent."""
        query = "SELECT id, generation, payload FROM reports WHERE id > ? ORDER BY id LIMIT ?"
        stored = [StoredReport(*row) for row in self._connection.execute(query, (after, count))]
        if stored:
            unsent = "UPDATE reports SET sent = 1 WHERE sent = 0 AND id BETWEEN ? AND ?"
            self._connection.execute(unsent, (stored[0].id, stored[-1].id))
        return stored

    def __len__(self) -> int:
        count: int = self._connection.execute("SELECT count(*) FROM reports").fetchone()[0]
        return count

    @property
    def _connection(self) -> sqlite3.Connection:
        if self._database is None or not self._database.in_transaction:
            raise RuntimeError("a report outbox is used inside its transaction")
        return self._database

    def _open(self) -> sqlite3.Connection:
        """Open the file; move it aside and make another one if it is damaged."""
        try:
            return self._open_file()
        except sqlite3.DatabaseError as error:
            # The other classes are those of a full disk, of missing rights and of a lock.
            if self._path is None or type(error) is not sqlite3.DatabaseError:
                raise
            move_aside(self._path, error)
            for suffix in SIDE_FILES:
                self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)
            return self._open_file()

    def _open_file(self) -> sqlite3.Connection:
        if self._path:
            # Reports name apps and devices: only the owner may read them.
            handle = os.open(self._path, os.O_CREAT | os.O_RDWR, 0o600)
            os.fchmod(handle, 0o600)
            os.close(handle)
        database = sqlite3.connect(
            self._path or ":memory:", BUSY_S, isolation_level=None, check_same_thread=False
        )
        try:
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = FULL")
            database.execute(SCHEMA)
            (state,) = database.execute("PRAGMA quick_check(1)").fetchone()
            if state != "ok":
                raise sqlite3.DatabaseError(state)
        except BaseException:
            database.close()
            raise
        return database

    def _merge_oldest(self, num_fewer: int) -> None:
        """Merge the oldest reports that were never sent into one for each bundle.

        With one bundle there are `num_fewer` reports fewer.
        """
        query = "SELECT id, payload FROM reports WHERE sent = 0 ORDER BY id LIMIT ?"
        rows = self._connection.execute(query, (num_fewer + 1,)).fetchall()
        by_bundle: dict[str, list[GenerationReport]] = {}
        for report in _readable(payload for _, payload in rows):
            by_bundle.setdefault(report.bundle_id, []).append(report)
        sums = [merge_reports(reports, uuid.uuid4().hex) for reports in by_bundle.values()]
        old_ids = [(id_,) for id_, _ in rows]
        self._connection.executemany("DELETE FROM reports WHERE id = ?", old_ids)
        new_rows = [(each.generation, False, encode_report(each)) for each in sums]
        self._connection.executemany(INSERT, new_rows)


def _readable(payloads: Iterable[bytes]) -> Iterator[GenerationReport]:
    for payload in payloads:
        try:
            yield decode_report(payload)
        except ProtocolError:  # no registry would accept an unreadable report
            continue
