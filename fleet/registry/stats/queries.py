"""Queries of a window by device, group, bundle or hour: to roll-ups, and to generations.

Roll-ups hold whole hours. The generations themselves are read for the fraction of an hour that a
window of at most a day may begin with.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from enum import StrEnum
from typing import Any, TypeAlias

import msgspec
from sqlalchemy import BigInteger, ColumnElement, Select, Table, and_, cast, func, or_, select
from sqlalchemy.orm import Session

from fleet.protocol.report import GenerationReport, Switch
from fleet.registry.identities.devices import has_device_role
from fleet.registry.models import GenerationRecord, IdentityRecord, TokenCount
from fleet.registry.stats.aggregate import ReportAggregate, from_columns
from fleet.registry.stats.rollup_columns import HOUR_S, mode_column
from fleet.registry.stats.rollup_tables import ROLLUPS, SOURCES, SWITCHES
from fleet.registry.stats.rollups import span_start
from fleet.registry.stats.time_spans import (
    Spans,
    ladder,
    rounded_up,
    trend_span_s,
    window_start,
)

StatsKey: TypeAlias = Any
"""The key of a row: a device's name, a group or None, a bundle's id, or the start of an hour."""


class By(StrEnum):
    """The subject of a row of the statistics."""

    DEVICE = "device"
    GROUP = "group"
    BUNDLE = "bundle"
    HOUR = "hour"


class StatsQuery(msgspec.Struct, frozen=True, kw_only=True):
    """The answers to count: since `since` (None is ever) of one device, a group's or all.

    `now` ends the trend. With `devices` only those of them count.
    """

    now: float
    since: float | None = None
    device: str | None = None
    group: str | None = None
    devices: tuple[str, ...] | None = None


def aggregate_by(db: Session, by: By, query: StatsQuery) -> defaultdict[StatsKey, ReportAggregate]:
    """Return the aggregates of a query, by the rows' keys."""
    since = _start(query)
    if by is By.HOUR:
        spans = [Spans(HOUR_S, rounded_up(since or 0.0, HOUR_S), None)]
    else:
        spans = ladder(since)
    aggregates = _rollup_aggregates(db, by, query, spans)
    if since is not None and since % HOUR_S:
        for key, report in _first_hour(db, by, query, since):
            aggregates[key].add(report)
    return aggregates


def counts_by_mode(db: Session, query: StatsQuery) -> defaultdict[tuple[str, str], Counter[str]]:
    """Return the counts of a query by bundle and mode, each by the columns of a roll-up."""
    since = _start(query)
    amounts = [column.name for column in ROLLUPS.c if not column.primary_key]
    counts: defaultdict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    sums_by_mode = _sums(ROLLUPS, By.BUNDLE, query, ladder(since), "mode")
    for bundle_id, mode, *sums in db.execute(sums_by_mode):
        counts[bundle_id, mode].update(dict(zip(amounts, sums, strict=True)))
    if since is not None and since % HOUR_S:
        first_hour: defaultdict[tuple[str, str], ReportAggregate] = defaultdict(ReportAggregate)
        for bundle_id, report in _first_hour(db, By.BUNDLE, query, since):
            first_hour[bundle_id, mode_column(report.mode)].add(report)
        for key, aggregate in first_hour.items():
            counts[key].update(aggregate.columns())
    return counts


def _start(query: StatsQuery) -> float | None:
    """Return the time from which on a query counts; None is ever."""
    return None if query.since is None else window_start(query.since, query.now)


def _rollup_aggregates(
    db: Session, by: By, query: StatsQuery, spans: Iterable[Spans]
) -> defaultdict[StatsKey, ReportAggregate]:
    sources: defaultdict[StatsKey, dict[str, int]] = defaultdict(dict)
    for key, source, tokens in db.execute(_sums(SOURCES, by, query, spans, "source")).all():
        sources[key][source] = tokens
    aggregates: defaultdict[StatsKey, ReportAggregate] = defaultdict(ReportAggregate)
    for key, *sums in db.execute(_sums(ROLLUPS, by, query, spans)).all():
        aggregates[key] = from_columns(sums, sources[key])
    switches = _sums(SWITCHES, by, query, spans, "mode", "reason")
    for key, mode, reason, number in db.execute(switches).all():
        aggregates[key].switches[mode, reason] += number
    return aggregates


def _sums(
    table: Table, by: By, query: StatsQuery, spans: Iterable[Spans], *columns: str
) -> Select[Any]:
    """Sum the amounts of a table's rows in `spans`, by the row's key and some of its columns."""
    others = [table.c[name] for name in columns]
    sums = [cast(func.sum(column), BigInteger) for column in table.c if not column.primary_key]
    rows = _rows(table, by, query, *others, *sums).group_by("key", *others)
    return rows.where(or_(*(_within(table, each) for each in spans)))


def trends(db: Session, by: By, query: StatsQuery) -> defaultdict[StatsKey, list[float | None]]:
    """Return the offload rate of equal spans of the window, oldest first.

    The rate of a span without tokens is None.
    """
    first, num_points, span_s = _trend_points(db, query)
    spans = Spans(span_s, first, first + num_points * span_s)
    tokens: defaultdict[StatsKey, list[int]] = defaultdict(lambda: [0] * num_points)
    cloud_tokens: defaultdict[StatsKey, list[int]] = defaultdict(lambda: [0] * num_points)
    columns = (ROLLUPS.c.start, ROLLUPS.c.tokens, ROLLUPS.c.cloud_tokens)
    rows = _rows(ROLLUPS, by, query, *columns)
    rows = rows.where(_within(ROLLUPS, spans))
    # Summed here: there are hardly more rows than sums.
    for key, start, num_tokens, num_cloud in db.execute(rows).all():
        i = (start - first) // span_s
        tokens[key][i] += num_tokens
        cloud_tokens[key][i] += num_cloud
    points: defaultdict[StatsKey, list[float | None]] = defaultdict(lambda: [None] * num_points)
    for key, totals in tokens.items():
        pairs = zip(totals, cloud_tokens[key], strict=True)
        points[key] = [round(cloud / total, 6) if total else None for total, cloud in pairs]
    return points


def _trend_points(db: Session, query: StatsQuery) -> tuple[int, int, int]:
    """Return the start, the number and the length of a trend's points."""
    since = query.since
    if since is None:
        oldest = db.scalar(select(func.min(ROLLUPS.c.start)).where(ROLLUPS.c.span_s == HOUR_S))
        since = query.now if oldest is None else oldest
    span_s = trend_span_s(query.now - since)
    first = span_start(since, span_s)
    return first, max(1, rounded_up(query.now - first, span_s) // span_s), span_s


def _within(table: Table, spans: Spans) -> ColumnElement[bool]:
    condition = and_(table.c.span_s == spans.span_s, table.c.start >= spans.first)
    return condition if spans.end is None else and_(condition, table.c.start < spans.end)


def _rows(table: Table, by: By, query: StatsQuery, *columns: ColumnElement[Any]) -> Select[Any]:
    """Select columns of a table's rows, after the key of the statistics' row for each."""
    device = table.c.device
    identity = select(IdentityRecord.group).where(IdentityRecord.name == device)
    key = {
        By.DEVICE: device,
        By.GROUP: identity.scalar_subquery(),
        By.BUNDLE: table.c.bundle_id,
        By.HOUR: table.c.start,
    }[by]
    rows = select(key.label("key"), *columns)
    if query.device is not None:
        rows = rows.where(device == query.device)
    if query.group is not None:
        members = select(IdentityRecord.name).where(IdentityRecord.group == query.group)
        rows = rows.where(device.in_(members))
    if query.devices is not None:
        rows = rows.where(device.in_(query.devices))
    return rows


def _first_hour(
    db: Session, by: By, query: StatsQuery, since: float
) -> Iterable[tuple[StatsKey, GenerationReport]]:
    """Return the generations from `since` to the end of its hour, each with its row's key."""
    row = GenerationRecord
    end = rounded_up(since, HOUR_S)
    is_in_hour = and_(row.started_at >= since, row.started_at < end)
    generations = (
        select(row, IdentityRecord.group)
        .join(IdentityRecord, IdentityRecord.name == row.device)
        .where(has_device_role(query.device), is_in_hour)
    )
    if query.group is not None:
        generations = generations.where(IdentityRecord.group == query.group)
    if query.devices is not None:
        generations = generations.where(row.device.in_(query.devices))
    records = db.execute(generations).all()
    sources = _sources(db, is_in_hour)
    for record, group in records:
        key = {
            By.DEVICE: record.device,
            By.GROUP: group,
            By.BUNDLE: record.bundle_id,
            By.HOUR: end - HOUR_S,
        }[by]
        yield key, _report(record, sources[record.id])


def _sources(db: Session, condition: ColumnElement[bool]) -> defaultdict[int, dict[str, int]]:
    """Return the tokens by source of generations, by the ids of their rows."""
    counts = (
        select(TokenCount.generation_id, TokenCount.source, TokenCount.tokens)
        .join(GenerationRecord, GenerationRecord.id == TokenCount.generation_id)
        .where(condition)
    )
    sources: defaultdict[int, dict[str, int]] = defaultdict(dict)
    for id_, source, tokens in db.execute(counts):
        sources[id_][source] = tokens
    return sources


def _report(record: GenerationRecord, sources: dict[str, int]) -> GenerationReport:
    fields = {
        name: getattr(record, name)
        for name in GenerationReport.__struct_fields__
        if name not in ("sources", "session", "switches")
    }
    switches = msgspec.convert(record.switches, tuple[Switch, ...])
    return GenerationReport(session=None, sources=sources, switches=switches, **fields)
