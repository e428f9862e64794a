"""Reports that the collector has not acknowledged yet, kept on disk."""

from __future__ import annotations

import os
import sqlite3
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

from edge_agent.reporting.report_merge import summarise
from fleet.errors import ProtocolError
from fleet.protocol.report import GenerationReport, decode_report, encode_report

REPORTS_FILE: Final = "reports.sqlite"
BUSY_S: Final = 5.0  # another agent on the same folder writes for milliseconds
SPARE_SHARE: Final = 10  # a tenth of the limit is freed at a time

SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS reports (
    id INTEGER PRIMARY KEY AUTOINCREMENT, generation TEXT NOT NULL UNIQUE, sent INTEGER NOT NULL, payload BLOB NOT NULL
)
"""
INSERT: Final = "INSERT OR IGNORE INTO reports (generation, sent, payload) VALUES (?, ?, ?)"


class StoredReport(NamedTuple):
    """One report; later ones have a larger `id`."""

    id: int
    generation: str
    payload: bytes


class ReportOutbox:
    """At most `limit` reports, in order, in a SQLite file that survives its process and the power; for one thread.

    Beyond the limit the oldest are summed up in one. What was sent once stays as it is: the registry may have counted
    it, and knows it again by its generation alone. Several processes may share a file.
    """

    def __init__(self, path: Path | None, limit: int) -> None:
        """`path` None keeps them in memory."""
        self._path = path
        self._limit = limit
        self._database: sqlite3.Connection | None = None

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All that is done inside happens, or nothing; every method below needs it.

        Raises:
            sqlite3.Error, OSError: the file cannot be used. The next transaction opens it anew.
        """
        try:
            database = self._database = self._database or self._open()
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
        """One line for what a transaction raised."""
        return (
            f"reports cannot be kept in {self._path} ({error}): make room, or remove the file; "
            "until then they are sent from memory"
        )

    def add(self, payloads: Mapping[str, bytes], *, sent: bool = False) -> None:
        """Keeps reports by generation, with `sent` as sent already; one that is kept already stays as it is."""
        rows = [(generation, sent, payload) for generation, payload in payloads.items()]
        self._here.executemany(INSERT, rows)
        if rows and (excess := len(self) - self._limit) > 0:
            self._sum_up_oldest(excess + self._limit // SPARE_SHARE)

    def remove(self, generations: Iterable[str]) -> None:
        self._here.executemany(
            "DELETE FROM reports WHERE generation = ?", [(each,) for each in generations]
        )

    def take(self, after: int, count: int) -> list[StoredReport]:
        """The first `count` reports behind the id `after`, which are on record as sent from now on."""
        query = "SELECT id, generation, payload FROM reports WHERE id > ? ORDER BY id LIMIT ?"
        kept = [StoredReport(*row) for row in self._here.execute(query, (after, count))]
        if kept:
            unsent = "UPDATE reports SET sent = 1 WHERE sent = 0 AND id BETWEEN ? AND ?"
            self._here.execute(unsent, (kept[0].id, kept[-1].id))
        return kept

    def __len__(self) -> int:
        count: int = self._here.execute("SELECT count(*) FROM reports").fetchone()[0]
        return count

    @property
    def _here(self) -> sqlite3.Connection:
        if self._database is None or not self._database.in_transaction:
            raise RuntimeError("a report outbox is used inside its transaction")
        return self._database

    def _open(self) -> sqlite3.Connection:
        if self._path:
            handle = os.open(
                self._path, os.O_CREAT | os.O_RDWR, 0o600
            )  # who was asked what is nobody else's business
            os.fchmod(handle, 0o600)
            os.close(handle)
        database = sqlite3.connect(
            self._path or ":memory:", BUSY_S, isolation_level=None, check_same_thread=False
        )
        try:
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = FULL")
            database.execute(SCHEMA)
        except BaseException:
            database.close()
            raise
        return database

    def _sum_up_oldest(self, num_less: int) -> None:
        """Puts one report for each bundle in the place of the oldest that were never sent, so that `num_less` go."""
        query = "SELECT id, payload FROM reports WHERE sent = 0 ORDER BY id LIMIT ?"
        rows = self._here.execute(query, (num_less + 1,)).fetchall()
        by_bundle: dict[str, list[GenerationReport]] = {}
        for report in _readable(payload for _, payload in rows):
            by_bundle.setdefault(report.bundle_id, []).append(report)
        totals = [summarise(reports, uuid.uuid4().hex) for reports in by_bundle.values()]
        self._here.executemany("DELETE FROM reports WHERE id = ?", [(row,) for row, _ in rows])
        self._here.executemany(
            INSERT, [(total.generation, False, encode_report(total)) for total in totals]
        )


def _readable(payloads: Iterable[bytes]) -> Iterator[GenerationReport]:
    for payload in payloads:
        try:
            yield decode_report(payload)
        except ProtocolError:  # an unreadable report is one that no registry would take
            continue
