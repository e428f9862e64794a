"""Roll-ups: every report is added to one row for each length of span, in the transaction that stores it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy import Table
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from fleet.protocol.report import GenerationReport
from fleet.registry.stats.aggregate import Tally
from fleet.registry.stats.rollup_tables import ROLLUPS, SOURCES, SPANS_S, SUMMED, SWITCHES


def add_to_rollups(db: Session, reports: Iterable[tuple[str, GenerationReport]]) -> None:
    """Adds reports, each with its device, that have just been stored for the first time."""
    tallies: dict[tuple[int, int, str, str], Tally] = defaultdict(Tally)
    for device, report in reports:
        for span_s in SPANS_S:
            tallies[span_s, span_start(report.started_at, span_s), device, report.bundle_id].add(
                report
            )
    rolled: list[dict[str, Any]] = []
    sources: list[dict[str, Any]] = []
    switches: list[dict[str, Any]] = []
    for (span_s, start, device, bundle_id), tally in sorted(
        tallies.items()
    ):  # one order for all: no deadlock
        key = {"span_s": span_s, "start": start, "device": device, "bundle_id": bundle_id}
        rolled.append(key | tally.counts)
        sources += [
            {**key, "source": source, "tokens": n}
            for source, n in sorted(tally.sources.items())
            if source not in SUMMED
        ]
        switches += [
            {**key, "mode": m, "reason": r, "switches": n}
            for (m, r), n in sorted(tally.switches.items())
        ]
    for table, rows in ((ROLLUPS, rolled), (SOURCES, sources), (SWITCHES, switches)):
        _add(db, table, rows)


def span_start(at: float, span_s: int) -> int:
    """When the span began that `at` lies in; both in seconds since 1970."""
    return int(at // span_s) * span_s


def _add(db: Session, table: Table, rows: Iterable[Mapping[str, Any]]) -> None:
    """Adds the amounts of `rows` to those of the rows with the same key, or inserts them."""
    key = [column.name for column in table.primary_key]
    amounts = [column.name for column in table.columns if not column.primary_key]
    insert = postgresql.insert if db.get_bind().dialect.name == "postgresql" else sqlite.insert
    statement = insert(table)
    statement = statement.on_conflict_do_update(
        index_elements=key,
        set_={name: table.c[name] + statement.excluded[name] for name in amounts},
    )
    if whole := [dict.fromkeys(amounts, 0) | dict(row) for row in rows]:
        db.execute(statement, whole)
