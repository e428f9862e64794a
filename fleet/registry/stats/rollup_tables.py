"""The roll-ups' tables: what a device's answers of one span of time add up to, by bundle.

A span starts at a multiple of its length, in seconds since 1970, and a generation belongs to the span in which it
started. Whoever asks for a window reads the fewest spans that cover it (ADR 0016).
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import BigInteger, Column, ForeignKey, Integer, String, Table

from fleet.protocol.modes import CLOUD, FALLBACK
from fleet.registry.models import Table as Base

HOUR_S: Final = 3600
DAY_S: Final = 24 * HOUR_S
SPANS_S: Final = (HOUR_S, 6 * HOUR_S, DAY_S, 2 * DAY_S, 4 * DAY_S, 8 * DAY_S, 16 * DAY_S)
"""Lengths of the levels; each is a multiple of the one before."""

SUMMED: Final = {CLOUD: "cloud_tokens", FALLBACK: "fallback_tokens"}
"""Sources whose tokens are amounts of `ROLLUPS`; those of all others are rows of `SOURCES`."""

AMOUNTS: Final = (
    "answers",
    "errors",
    "prompt_tokens",
    "tokens",
    "cloud_tokens",
    "fallback_tokens",
    "assists",
    "verifies",
    "drafted",
    "bytes_up",
    "bytes_down",
    "judged",
    "agreed",
)

NUM_BUCKETS: Final = 32
BUCKETS_MS: Final[tuple[float, ...]] = tuple(2.0 ** (1 + i / 2) for i in range(NUM_BUCKETS - 1))
"""Upper ends of a histogram's buckets: from 2 ms to 65,536 ms by the square root of 2; the last bucket has none.

What is read from the middle of a bucket is wrong by at most a fifth.
"""

TTFT: Final = tuple(f"ttft_{i}" for i in range(NUM_BUCKETS))
TPOT: Final = tuple(f"tpot_{i}" for i in range(NUM_BUCKETS))


def _key() -> tuple[Column[int], Column[int], Column[str], Column[str]]:
    """Time first: a window is then a few pieces of the table, whatever the planner thinks of it."""
    return (
        Column("span_s", Integer, primary_key=True, autoincrement=False),
        Column("start", BigInteger, primary_key=True, autoincrement=False),
        Column("device", String(63), ForeignKey("identities.name"), primary_key=True),
        Column("bundle_id", String(63), primary_key=True),
    )


ROLLUPS: Final = Table(
    "rollups",
    Base.metadata,
    *_key(),
    *(Column(name, BigInteger, nullable=False) for name in AMOUNTS),
    *(
        Column(name, Integer, nullable=False) for name in (*TTFT, *TPOT)
    ),  # PostgreSQL adds these up twice as fast
    sqlite_with_rowid=False,
)

SOURCES: Final = Table(
    "rollup_sources",
    Base.metadata,
    *_key(),
    Column("source", String(20), primary_key=True),
    Column("tokens", BigInteger, nullable=False),
    sqlite_with_rowid=False,
)

SWITCHES: Final = Table(
    "rollup_switches",
    Base.metadata,
    *_key(),
    Column("mode", String(63), primary_key=True),
    Column("reason", String(120), primary_key=True),
    Column("switches", BigInteger, nullable=False),
    sqlite_with_rowid=False,
)

LEVELS: Final = (ROLLUPS, SOURCES, SWITCHES)
