"""The statistics of the fleet's answers, as rows.

A window of at most a day counts the answers that began in it; a longer one begins with its whole
hour, and one of more than 8 days with its whole day. Groups are those of today: the past answers of
a device that has moved count for its new group.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from fleet.protocol.counts import COUNT_FIELDS
from fleet.protocol.modes import NO_EXITS, offload_rate
from fleet.registry.identities.devices import (
    check_known_device,
    has_device_role,
    is_device,
    is_online,
)
from fleet.registry.models import BundleRecord, IdentityRecord, StatusRecord
from fleet.registry.results import BundleStats, GroupStats, HourStats, StatsRow
from fleet.registry.stats.aggregate import ReportAggregate, quantiles_ms
from fleet.registry.stats.queries import By, StatsQuery, aggregate_by, trends

QUANTILES = (0.5, 0.95)


class Quantiles(NamedTuple):
    """Times in ms; None without answers."""

    ttft_p50_ms: float | None
    ttft_p95_ms: float | None
    tpot_p50_ms: float | None
    tpot_p95_ms: float | None


def stats_per_device(db: Session, query: StatsQuery) -> list[StatsRow]:
    """Return a row for each device, by name, also for one without answers unless it is deleted.

    Raises:
        UnknownDeviceError: the query's device is not enrolled.
    """
    if query.device is not None:
        check_known_device(db, query.device)
    aggregates = aggregate_by(db, By.DEVICE, query)
    points = trends(db, By.DEVICE, query)
    devices = (
        select(IdentityRecord.name, IdentityRecord.group, is_online(), StatusRecord.last_seen)
        .outerjoin(StatusRecord, StatusRecord.device == IdentityRecord.name)
        .where(has_device_role(query.device), or_(is_device(), IdentityRecord.name.in_(aggregates)))
        .order_by(IdentityRecord.name)
    )
    if query.group is not None:
        devices = devices.where(IdentityRecord.group == query.group)
    if query.devices is not None:
        devices = devices.where(IdentityRecord.name.in_(query.devices))
    rows = db.execute(devices).all()
    counts = _stats_fields([(aggregates[name], points[name]) for name, *_ in rows])
    return [
        StatsRow(device=name, group=group, online=bool(online), last_seen=last_seen, **fields)
        for (name, group, online, last_seen), fields in zip(rows, counts, strict=True)
    ]


def grouped_stats(
    db: Session, by: By, query: StatsQuery
) -> list[GroupStats] | list[BundleStats] | list[HourStats]:
    """Return a row for each group, bundle or hour that has answers, in order.

    Raises:
        UnknownDeviceError: the query's device is not enrolled.
    """
    if query.device is not None:
        check_known_device(db, query.device)
    aggregates = aggregate_by(db, by, query)
    points = {} if by is By.HOUR else trends(db, by, query)
    keys = sorted(aggregates, key=lambda key: (key is not None, key))
    fields = _stats_fields([(aggregates[key], points.get(key, ())) for key in keys])
    rows = list(zip(keys, fields, strict=True))
    if by is By.HOUR:
        return [HourStats(hour_at=float(key), **counts) for key, counts in rows]
    if by is By.BUNDLE:
        bundles = db.execute(select(BundleRecord.bundle_id, BundleRecord.name))
        names = {bundle.bundle_id: bundle.name for bundle in bundles}
        return [
            BundleStats(bundle_id=key, bundle_name=names.get(key), **counts) for key, counts in rows
        ]
    return [GroupStats(group=key, **counts) for key, counts in rows]


def _stats_fields(
    pairs: Sequence[tuple[ReportAggregate, Iterable[float | None]]],
) -> list[dict[str, Any]]:
    """Return the fields of `StatsCounts` for each aggregate and its trend."""
    aggregates = [aggregate for aggregate, _ in pairs]
    return [
        _fields(aggregate, quantiles) | {"trend": tuple(trend)}
        for (aggregate, trend), quantiles in zip(pairs, _quantiles(aggregates), strict=True)
    ]


def _quantiles(aggregates: Sequence[ReportAggregate]) -> list[Quantiles]:
    columns = [
        [None if ms is None else round(ms, 3) for ms in column]
        for histograms in ([each.ttft for each in aggregates], [each.tpot for each in aggregates])
        for column in quantiles_ms(histograms, QUANTILES)
    ]
    return [Quantiles(*row) for row in zip(*columns, strict=True)]


def _fields(aggregate: ReportAggregate, quantiles: Quantiles) -> dict[str, Any]:
    counts = aggregate.counts
    sources = {name: counts.sources[name] for name in sorted(counts.sources, key=_depth)}
    total = sum(sources.values())
    shares = {source: round(tokens / total, 6) for source, tokens in sources.items() if total}
    switches = {
        f"{mode}: {reason}": number for (mode, reason), number in aggregate.switches.most_common()
    }
    return {
        "generations": aggregate.num_answers,
        "errors": aggregate.num_errors,
        "sources": sources,
        "offload_rate": round(offload_rate(sources), 6),
        "shares": shares,
        "switches": switches,
        **{name: getattr(counts, name) for name in COUNT_FIELDS},
        **quantiles._asdict(),
    }


@lru_cache(1024)  # devices name their sources
def _depth(source: str) -> tuple[int, int]:
    """Return the order of a source: exits by their layer, then the others."""
    if source in NO_EXITS:
        return 1 + NO_EXITS.index(source), 0
    return 0, int(source.removeprefix("exit:"))
