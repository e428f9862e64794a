"""The roll-ups' tables: the sums of a device's answers in one span of time, by bundle and mode.

A span starts at a multiple of its length, in seconds since 1970, and a generation belongs to the
span in which it started. A query for a window reads the fewest spans that cover it (ADR 0016).
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import BigInteger, Column, ForeignKey, Integer, String, Table

from fleet.registry.models import Table as Base
from fleet.registry.stats.rollup_columns import AMOUNTS, TPOT, TTFT


def _key() -> tuple[Column[int], Column[int], Column[str], Column[str]]:
    """Return the key columns, time first: a window is then a few ranges of the table."""
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
    Column("mode", String(63), primary_key=True),
    *(Column(name, BigInteger, nullable=False) for name in AMOUNTS),
    # PostgreSQL adds 32-bit integers up twice as fast.
    *(Column(name, Integer, nullable=False) for name in (*TTFT, *TPOT)),
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
