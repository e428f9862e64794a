"""Roll-ups: each report is added to one row for each length of span, as it is stored."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from sqlalchemy import Table
from sqlalchemy.orm import Session

from fleet.protocol.report import GenerationReport
from fleet.registry.stats.aggregate import ReportAggregate
from fleet.registry.stats.bulk_insert import execute_rows, insert_into
from fleet.registry.stats.rollup_columns import SPANS_S, SUMMED
from fleet.registry.stats.rollup_tables import ROLLUPS, SOURCES, SWITCHES

RollupKey: TypeAlias = tuple[int, int, str, str]
"""The length and the start of a span, a device, and a bundle."""


def add_to_rollups(db: Session, reports: Iterable[tuple[str, GenerationReport]]) -> None:
    """Add reports, each with its device, that have just been stored for the first time."""
    rollups: list[dict[str, Any]] = []
    sources: list[dict[str, Any]] = []
    switches: list[dict[str, Any]] = []
    # One order in all processes: no deadlock.
    for (span_s, start, device, bundle_id), aggregate in sorted(_aggregates(reports).items()):
        key = {"span_s": span_s, "start": start, "device": device, "bundle_id": bundle_id}
        rollups.append(key | aggregate.columns())
        sources += [
            {**key, "source": source, "tokens": tokens}
            for source, tokens in sorted(aggregate.counts.sources.items())
            if source not in SUMMED
        ]
        switches += [
            {**key, "mode": mode, "reason": reason, "switches": count}
            for (mode, reason), count in sorted(aggregate.switches.items())
        ]
    _add(db, ROLLUPS, rollups)
    _add(db, SOURCES, sources)
    _add(db, SWITCHES, switches)


def _aggregates(
    reports: Iterable[tuple[str, GenerationReport]],
) -> dict[RollupKey, ReportAggregate]:
    aggregates: dict[RollupKey, ReportAggregate] = defaultdict(ReportAggregate)
    for device, report in reports:
        for span_s in SPANS_S:
            start = span_start(report.started_at, span_s)
            aggregates[span_s, start, device, report.bundle_id].add(report)
    return aggregates


def span_start(at: float, span_s: int) -> int:
    """Return the start of the span that holds `at`; both in seconds since 1970."""
    return int(at // span_s) * span_s


def _add(db: Session, table: Table, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add the amounts of `rows` to those of the rows with the same key, or insert them."""
    if not rows:
        return
    key = [column.name for column in table.primary_key]
    amounts = [column.name for column in table.columns if not column.primary_key]
    insert = insert_into(db, table)
    statement = insert.on_conflict_do_update(
        index_elements=key,
        set_={name: table.c[name] + insert.excluded[name] for name in amounts},
    )
    execute_rows(db, statement, table, rows)
