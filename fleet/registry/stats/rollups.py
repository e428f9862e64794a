"""Roll-ups: each report is added to one row for each length of span, as it is stored."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, TypeAlias

from sqlalchemy import Table
from sqlalchemy.orm import Session

from fleet.protocol.report import GenerationReport
from fleet.registry.stats.aggregate import ReportAggregate
from fleet.registry.stats.bulk_insert import execute_rows, insert_into
from fleet.registry.stats.rollup_columns import SPANS_S, SUMMED, mode_column
from fleet.registry.stats.rollup_tables import ROLLUPS, SOURCES, SWITCHES

RollupKey: TypeAlias = tuple[int, int, str, str, str]
"""The length and the start of a span, a device, a bundle, and a mode."""

KEYS: Final = {
    table: tuple(column.name for column in table.primary_key)
    for table in (ROLLUPS, SOURCES, SWITCHES)
}


def add_to_rollups(db: Session, reports: Iterable[tuple[str, GenerationReport]]) -> None:
    """Add reports, each with its device, that have just been stored for the first time."""
    rollups: list[dict[str, Any]] = []
    sources: Counter[tuple[Any, ...]] = Counter()
    switches: Counter[tuple[Any, ...]] = Counter()
    for key, aggregate in _aggregates(reports).items():
        rollups.append(_key_columns(ROLLUPS, key) | aggregate.columns())
        span = key[:-1]  # without the mode
        for source, tokens in aggregate.counts.sources.items():
            if source not in SUMMED:
                sources[*span, source] += tokens
        for switch, number in aggregate.switches.items():
            switches[*span, *switch] += number
    _add(db, ROLLUPS, rollups)
    _add(db, SOURCES, _rows(SOURCES, "tokens", sources))
    _add(db, SWITCHES, _rows(SWITCHES, "switches", switches))


def _aggregates(
    reports: Iterable[tuple[str, GenerationReport]],
) -> dict[RollupKey, ReportAggregate]:
    """Return the sums of reports, in one order in all processes: no deadlock."""
    aggregates: dict[RollupKey, ReportAggregate] = defaultdict(ReportAggregate)
    for device, report in reports:
        mode = mode_column(report.mode)
        for span_s in SPANS_S:
            start = span_start(report.started_at, span_s)
            aggregates[span_s, start, device, report.bundle_id, mode].add(report)
    return dict(sorted(aggregates.items()))


def _key_columns(table: Table, key: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip(KEYS[table], key, strict=True))


def _rows(table: Table, amount: str, counts: Counter[tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Return the rows of a table with one amount, in the order of their keys."""
    return [_key_columns(table, key) | {amount: number} for key, number in sorted(counts.items())]


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
