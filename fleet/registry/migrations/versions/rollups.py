"""Roll-ups by spans of time, filled from the existing generations.

Generations get columns for verifies, drafts and switches.
"""

from itertools import pairwise
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

SPANS_S = (3600, 21_600, 86_400, 345_600)
SUMS = ("prompt_tokens", "tokens", "assists", "verifies", "drafted", "bytes_up", "bytes_down")
BUCKETS_MS = [2.0 ** (1 + i / 2) for i in range(31)]
COUNTS = [
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
    *(f"ttft_{i}" for i in range(32)),
    *(f"tpot_{i}" for i in range(32)),
]


def upgrade() -> None:
    with op.batch_alter_table("generations") as batch:
        batch.add_column(sa.Column("verifies", sa.BigInteger(), nullable=False, server_default="0"))
        batch.add_column(sa.Column("drafted", sa.BigInteger(), nullable=False, server_default="0"))
        batch.add_column(sa.Column("switches", sa.JSON(), nullable=False, server_default="[]"))
        batch.add_column(sa.Column("recorded_at", sa.Double(), nullable=False, server_default="0"))
        batch.create_index(op.f("ix_generations_recorded_at"), ["recorded_at"], unique=False)
    op.execute("UPDATE generations SET recorded_at = started_at")
    _create("rollups", ["bundle_id"], COUNTS)
    _create("rollup_sources", ["bundle_id", "source"], ["tokens"])
    _create("rollup_switches", ["bundle_id", "mode", "reason"], ["switches"])
    for statement in (_hours(), _hours_of_sources(), *_longer("rollups", "bundle_id", COUNTS)):
        op.execute(statement)
    for statement in _longer("rollup_sources", "bundle_id, source", ["tokens"]):
        op.execute(statement)


def _create(name: str, more_key: list[str], counts: list[str]) -> None:
    lengths = {"bundle_id": 63, "source": 20, "mode": 63, "reason": 120}
    columns: list[sa.Column[Any]] = [
        sa.Column("span_s", sa.Integer(), nullable=False, autoincrement=False),
        sa.Column("start", sa.BigInteger(), nullable=False, autoincrement=False),
        sa.Column("device", sa.String(63), nullable=False),
    ]
    columns += [sa.Column(key, sa.String(lengths[key]), nullable=False) for key in more_key]
    columns += [sa.Column(count, _type(count), nullable=False) for count in counts]
    op.create_table(
        name,
        *columns,
        sa.ForeignKeyConstraint(["device"], ["identities.name"], name=op.f(f"fk_{name}_device")),
        sa.PrimaryKeyConstraint("span_s", "start", "device", *more_key, name=op.f(f"pk_{name}")),
        sqlite_with_rowid=False,
    )


def _type(count: str) -> sa.Integer:
    return sa.Integer() if count.startswith(("ttft_", "tpot_")) else sa.BigInteger()


def _hours() -> str:
    values = ["count(*)", _when("finish_reason = 'error'"), "sum(prompt_tokens)", "sum(tokens)"]
    values += [f"sum({_from(source)})" for source in ("cloud", "fallback")]
    values += [f"sum({name})" for name in SUMS[2:]]
    values += [_when(f"tokens > 0 AND {part}") for part in _buckets("ttft_ms")]
    values += [_when(f"tokens > 1 AND {part}") for part in _buckets("tpot_ms")]
    start = _start("started_at", 3600)
    return (
        f"INSERT INTO rollups (device, span_s, start, bundle_id, {', '.join(COUNTS)}) "
        f"SELECT device, 3600, {start}, bundle_id, {', '.join(values)} FROM generations "
        f"GROUP BY device, {start}, bundle_id"
    )


def _hours_of_sources() -> str:
    start = _start("started_at", 3600)
    return (
        "INSERT INTO rollup_sources (device, span_s, start, bundle_id, source, tokens) "
        f"SELECT device, 3600, {start}, bundle_id, source, sum(token_counts.tokens) "
        "FROM generations JOIN token_counts ON generation_id = generations.id "
        f"GROUP BY device, {start}, bundle_id, source"
    )


def _longer(table: str, key: str, counts: list[str]) -> list[str]:
    sums = ", ".join(f"sum({count})" for count in counts)
    return [
        f"INSERT INTO {table} (device, span_s, start, {key}, {', '.join(counts)}) "
        f"SELECT device, {span_s}, {_start('start', span_s)}, {key}, {sums} "
        f"FROM {table} WHERE span_s = 3600 "
        f"GROUP BY device, {_start('start', span_s)}, {key}"
        for span_s in SPANS_S[1:]
    ]


def _start(time: str, span_s: int) -> str:
    """Round a time, which is not negative, down; PostgreSQL's cast alone rounds to the nearest."""
    if op.get_bind().dialect.name == "sqlite":
        return f"CAST({time} / {span_s} AS INTEGER) * {span_s}"
    return f"CAST(floor({time} / {span_s}) AS BIGINT) * {span_s}"


def _buckets(time: str) -> list[str]:
    ends = [f"{end!r}" for end in BUCKETS_MS]
    middle = [f"{time} > {low} AND {time} <= {high}" for low, high in pairwise(ends)]
    return [f"{time} <= {ends[0]}", *middle, f"{time} > {ends[-1]}"]


def _when(condition: str) -> str:
    return f"sum(CASE WHEN {condition} THEN 1 ELSE 0 END)"


def _from(source: str) -> str:
    return (
        "coalesce((SELECT token_counts.tokens FROM token_counts "
        f"WHERE generation_id = generations.id AND source = '{source}'), 0)"
    )
