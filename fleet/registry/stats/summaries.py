"""What the fleet's answers add up to, as rows.

A window of at most a day counts the answers that began in it; a longer one begins with its whole hour, and one of more
than 8 days with its whole day. Groups are those of today: a device that has moved takes its past along.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from operator import itemgetter
from typing import Any, Final

from sqlalchemy import select
from sqlalchemy.orm import Session

from fleet.protocol.modes import NO_EXITS, offload_rate
from fleet.registry.identities.devices import check_device, is_device, is_online
from fleet.registry.models import IdentityRecord, StatusRecord
from fleet.registry.results import BundleStats, Counts, GroupStats, HourStats, StatsRow
from fleet.registry.stats.aggregate import Tally, quantiles_ms
from fleet.registry.stats.queries import By, StatsQuery, count, trends
from fleet.registry.stats.rollup_tables import AMOUNTS, TPOT, TTFT

PLAIN: Final = tuple(name for name in AMOUNTS if name in Counts.__struct_fields__)

HISTOGRAMS: Final = itemgetter(*TTFT), itemgetter(*TPOT)


def device_stats(db: Session, asked: StatsQuery) -> list[StatsRow]:
    """A row for each device, by name, also for one without answers; raises UnknownDeviceError."""
    if asked.device is not None:
        check_device(db, asked.device)
    tallies = count(db, By.DEVICE, asked)
    points = trends(db, By.DEVICE, asked)
    query = (
        select(IdentityRecord.name, IdentityRecord.group, is_online(), StatusRecord.last_seen)
        .outerjoin(StatusRecord, StatusRecord.device == IdentityRecord.name)
        .where(is_device(asked.device))
        .order_by(IdentityRecord.name)
    )
    if asked.group is not None:
        query = query.where(IdentityRecord.group == asked.group)
    found = db.execute(query).all()
    counts = _counts([(tallies[name], points[name]) for name, *_ in found])
    return [
        StatsRow(device=name, group=group, online=bool(online), last_seen=seen, **row)
        for (name, group, online, seen), row in zip(found, counts, strict=True)
    ]


def grouped_stats(
    db: Session, by: By, asked: StatsQuery
) -> list[GroupStats] | list[BundleStats] | list[HourStats]:
    """A row for each group, bundle or hour that has answers, in order; raises UnknownDeviceError."""
    if asked.device is not None:
        check_device(db, asked.device)
    tallies = count(db, by, asked)
    points = trends(db, by, asked) if by is not By.HOUR else {}
    keys = sorted(tallies, key=lambda key: (key is not None, key))
    rows = list(
        zip(keys, _counts([(tallies[key], points.get(key, ())) for key in keys]), strict=True)
    )
    if by is By.HOUR:
        return [HourStats(hour_at=float(key), **counts) for key, counts in rows]
    if by is By.BUNDLE:
        return [BundleStats(bundle_id=key, **counts) for key, counts in rows]
    return [GroupStats(group=key, **counts) for key, counts in rows]


def _counts(found: Sequence[tuple[Tally, Iterable[float | None]]]) -> list[dict[str, Any]]:
    """The fields of `Counts` for each tally and its trend."""
    quantiles = [
        [ms if ms is None else round(ms, 3) for ms in quantile]
        for histogram in HISTOGRAMS
        for quantile in quantiles_ms([histogram(tally.counts) for tally, _ in found], (0.5, 0.95))
    ]
    rows: list[dict[str, Any]] = []
    for (tally, trend), *times in zip(found, *quantiles, strict=True):
        counts = tally.counts
        sources = {name: tally.sources[name] for name in sorted(tally.sources, key=_depth)}
        total = sum(sources.values())
        rows.append(
            {
                "generations": counts["answers"],
                "sources": sources,
                "offload_rate": round(offload_rate(sources), 6),
                "shares": {source: round(tokens / total, 6) for source, tokens in sources.items()}
                if total
                else {},
                "switches": {
                    f"{mode}: {reason}": n for (mode, reason), n in tally.switches.most_common()
                },
                "trend": tuple(trend),
                **{name: counts[name] for name in PLAIN},
                "ttft_p50_ms": times[0],
                "ttft_p95_ms": times[1],
                "tpot_p50_ms": times[2],
                "tpot_p95_ms": times[3],
            }
        )
    return rows


@lru_cache(1024)  # devices name their sources
def _depth(source: str) -> tuple[int, int]:
    """Order of a source: exits by their layer, then what is no exit."""
    if source in NO_EXITS:
        return 1 + NO_EXITS.index(source), 0
    return 0, int(source.removeprefix("exit:"))
