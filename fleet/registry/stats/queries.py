"""What is counted of a window, by device, group, bundle or hour: questions to roll-ups, and to generations.

Roll-ups know whole hours. The generations themselves are asked for the part of an hour that a window of at most a day
may begin with.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from enum import StrEnum
from typing import Any, Final, TypeAlias

import msgspec
from sqlalchemy import BigInteger, ColumnElement, Select, Table, and_, cast, func, or_, select
from sqlalchemy.orm import Session

from fleet.protocol.report import GenerationReport, Switch
from fleet.registry.identities.devices import is_device
from fleet.registry.models import GenerationRecord, IdentityRecord, TokenCount
from fleet.registry.stats.aggregate import Tally
from fleet.registry.stats.rollup_tables import (
    AMOUNTS,
    HOUR_S,
    ROLLUPS,
    SOURCES,
    SUMMED,
    SWITCHES,
    TPOT,
    TTFT,
)
from fleet.registry.stats.rollups import span_start
from fleet.registry.stats.time_spans import Spans, beginning, ladder, rounded_up, trend_span_s

Key: TypeAlias = Any
"""Of a row: a device's name, a group or None, a bundle's id, or the start of an hour."""

COUNTS: Final = (*AMOUNTS, *TTFT, *TPOT)


class By(StrEnum):
    """What a row of the statistics is about."""

    DEVICE = "device"
    GROUP = "group"
    BUNDLE = "bundle"
    HOUR = "hour"


class StatsQuery(msgspec.Struct, frozen=True, kw_only=True):
    """What to count: answers since `since` (None is ever) of one device, a group's or all; `now` ends the trend.

    `devices` are those that are counted, None is every one of these.
    """

    now: float
    since: float | None = None
    device: str | None = None
    group: str | None = None
    devices: tuple[str, ...] | None = None


def count(db: Session, by: By, asked: StatsQuery) -> defaultdict[Key, Tally]:
    """What was counted, by the rows' keys."""
    tallies: defaultdict[Key, Tally] = defaultdict(Tally)
    since = None if asked.since is None else beginning(asked.since, asked.now)
    spans = (
        ladder(since)
        if by is not By.HOUR
        else [Spans(HOUR_S, rounded_up(since or 0.0, HOUR_S), None)]
    )
    for key, *sums in db.execute(_sums(ROLLUPS, by, asked, spans)).all():
        counts: Counter[str] = Counter()
        tallies[key] = Tally(counts)
        dict.update(
            counts, zip(COUNTS, sums, strict=True)
        )  # a Counter's own takes four times as long
        tallies[key].sources.update(
            {source: n for source, name in SUMMED.items() if (n := counts[name])}
        )
    for key, source, tokens in db.execute(_sums(SOURCES, by, asked, spans)).all():
        tallies[key].sources[source] += tokens
    for key, mode, reason, switches in db.execute(_sums(SWITCHES, by, asked, spans)).all():
        tallies[key].switches[mode, reason] += switches
    if since is not None and since % HOUR_S:
        for key, report in _first_hour(db, by, asked, since):
            tallies[key].add(report)
    return tallies


def _sums(table: Table, by: By, asked: StatsQuery, spans: Iterable[Spans]) -> Select[Any]:
    """The amounts of a table's rows in `spans`, by the row's key and what else a row of it is about."""
    about = [table.c[name] for name in ("source", "mode", "reason") if name in table.c]
    sums = [cast(func.sum(column), BigInteger) for column in table.c if not column.primary_key]
    query = _rows(table, by, asked, *about, *sums).group_by("key", *about)
    return query.where(or_(*(_within(table, part) for part in spans)))


def trends(db: Session, by: By, asked: StatsQuery) -> defaultdict[Key, list[float | None]]:
    """The offload rate of equal parts of the window, oldest first; None where nothing was generated."""
    since = asked.since
    if since is None:
        oldest = db.scalar(select(func.min(ROLLUPS.c.start)).where(ROLLUPS.c.span_s == HOUR_S))
        since = asked.now if oldest is None else oldest
    span_s = trend_span_s(asked.now - since)
    first = span_start(since, span_s)
    start = ROLLUPS.c.start
    num_points = max(1, rounded_up(asked.now - first, span_s) // span_s)
    query = _rows(ROLLUPS, by, asked, start, ROLLUPS.c.tokens, ROLLUPS.c.cloud_tokens).where(
        _within(ROLLUPS, Spans(span_s, first, first + num_points * span_s))
    )
    sums: defaultdict[Key, list[int]] = defaultdict(lambda: [0] * (2 * num_points))
    for key, at, tokens, cloud_tokens in db.execute(query).all():  # hardly more than there are sums
        row = sums[key]
        i = (at - first) // span_s
        row[i] += tokens
        row[i + num_points] += cloud_tokens
    points: defaultdict[Key, list[float | None]] = defaultdict(lambda: [None] * num_points)
    for key, row in sums.items():
        pairs = zip(row[:num_points], row[num_points:], strict=True)
        points[key] = [round(cloud / tokens, 6) if tokens else None for tokens, cloud in pairs]
    return points


def _within(table: Table, part: Spans) -> ColumnElement[bool]:
    condition = and_(table.c.span_s == part.span_s, table.c.start >= part.first)
    return condition if part.end is None else and_(condition, table.c.start < part.end)


def _rows(table: Table, by: By, asked: StatsQuery, *columns: ColumnElement[Any]) -> Select[Any]:
    """These columns of a table's rows, behind the key of the statistics' row that each belongs to."""
    group = (
        select(IdentityRecord.group).where(IdentityRecord.name == table.c.device).scalar_subquery()
    )
    key = {
        By.DEVICE: table.c.device,
        By.GROUP: group,
        By.BUNDLE: table.c.bundle_id,
        By.HOUR: table.c.start,
    }[by]
    query = select(key.label("key"), *columns)
    if asked.device is not None:
        query = query.where(table.c.device == asked.device)
    if asked.group is not None:
        query = query.where(
            table.c.device.in_(
                select(IdentityRecord.name).where(IdentityRecord.group == asked.group)
            )
        )
    return query if asked.devices is None else query.where(table.c.device.in_(asked.devices))


def _first_hour(
    db: Session, by: By, asked: StatsQuery, since: float
) -> Iterable[tuple[Key, GenerationReport]]:
    """The generations from `since` to the end of its hour, each with its row's key."""
    row = GenerationRecord
    end = rounded_up(since, HOUR_S)
    query = (
        select(row, IdentityRecord.group)
        .join(IdentityRecord, IdentityRecord.name == row.device)
        .where(is_device(asked.device), row.started_at >= since, row.started_at < end)
    )
    if asked.group is not None:
        query = query.where(IdentityRecord.group == asked.group)
    if asked.devices is not None:
        query = query.where(row.device.in_(asked.devices))
    generations = db.execute(query).all()
    sources: defaultdict[int, dict[str, int]] = defaultdict(dict)
    for id_, source, tokens in db.execute(
        select(TokenCount.generation_id, TokenCount.source, TokenCount.tokens)
        .join(row, row.id == TokenCount.generation_id)
        .where(row.started_at >= since, row.started_at < end)
    ):
        sources[id_][source] = tokens
    for record, group in generations:
        key = {
            By.DEVICE: record.device,
            By.GROUP: group,
            By.BUNDLE: record.bundle_id,
            By.HOUR: end - HOUR_S,
        }[by]
        yield key, _report(record, sources[record.id])


def _report(record: GenerationRecord, sources: dict[str, int]) -> GenerationReport:
    return GenerationReport(
        generation=record.generation,
        app=record.app,
        request=record.request,
        session=None,
        worker=record.worker,
        bundle_id=record.bundle_id,
        mode=record.mode,
        started_at=record.started_at,
        prompt_tokens=record.prompt_tokens,
        tokens=record.tokens,
        sources=sources,
        assists=record.assists,
        bytes_up=record.bytes_up,
        bytes_down=record.bytes_down,
        ttft_ms=record.ttft_ms,
        tpot_ms=record.tpot_ms,
        finish_reason=record.finish_reason,
        verifies=record.verifies,
        drafted=record.drafted,
        switches=msgspec.convert(record.switches, tuple[Switch, ...]),
        answers=record.answers,
        judged=record.judged,
        agreed=record.agreed,
    )
