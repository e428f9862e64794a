"""Time of `fleet stats` over 1,000 devices and 30 days.

    python -m benchmarks.stats [--devices N] [--days N] [--only sqlite|postgresql] [--json]

The roll-ups of about 5 million generations, 7 an hour and device from two exits, the cloud and
fallback, are written into a SQLite file and into a PostgreSQL server of its own, both in temporary
folders. The window begins where most spans are needed to cover it. The output is the median of the
queries of `fleet stats --since`, in milliseconds, on an open connection.
"""

from __future__ import annotations

import gc
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Final

import typer
from sqlalchemy import Connection, Engine, insert, text

from fleet.errors import ConfigError
from fleet.protocol.types import DAY_S
from fleet.registry.database import open_database, writing
from fleet.registry.models import IdentityRecord, StatusRecord
from fleet.registry.stats.rollup_columns import AMOUNTS, HOUR_S, SPANS_S, SUMMED, TPOT, TTFT
from fleet.registry.stats.rollup_tables import LEVELS, ROLLUPS, SOURCES, SWITCHES
from fleet.registry.stats.rollups import span_start
from fleet.registry.store import Registry
from fleet.utils.console import new_console
from fleet.utils.optional_imports import require

SINCE: Final = (
    1293 * SPANS_S[-1] + DAY_S + 1800.0
)  # one day into a longest span: most spans, one of each length
NUM_GROUPS: Final = 20
ANSWERS: Final = 7
TOKENS: Final = {"exit:15": 180, "exit:24": 120, "cloud": 140, "fallback": 8}
BUNDLE: Final = "b" * 32
RUNS: Final = 9

app = typer.Typer(add_completion=False)


@app.command()
def run(
    devices: Annotated[int, typer.Option(min=1)] = 1000,
    days: Annotated[int, typer.Option(min=1)] = 30,
    only: Annotated[str | None, typer.Option(help="One database: sqlite or postgresql.")] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Time the statistics of a large fleet on both databases."""
    if only not in (None, "sqlite", "postgresql"):
        raise ConfigError(f"--only {only!r}: expected sqlite or postgresql")
    errors = new_console(stderr=True)
    results = {}
    for name in ("sqlite", "postgresql"):
        if only in (None, name):
            with database(name) as url:
                errors.print(f"{name}: filling the roll-ups of {devices:,} devices, {days} days")
                fill_rollups(url, devices, days)
                results[f"{name}_ms"] = round(
                    median_ms(url, SINCE + days * 24 * HOUR_S, devices), 1
                )
    print(
        json.dumps(results)
        if as_json
        else "\n".join(f"{name:14} {ms:8.1f}" for name, ms in results.items())
    )


@contextmanager
def database(name: str) -> Iterator[str]:
    """Provide an empty database in the block."""
    if name == "sqlite":
        with tempfile.TemporaryDirectory(prefix="fleet-stats-") as folder:
            yield f"sqlite:///{folder}/registry.sqlite"
        return
    require("postgres", "psycopg")
    from benchmarks.postgresql import postgresql_server

    with postgresql_server() as server:
        yield server.create("stats")


def median_ms(url: str, now: float, devices: int) -> float:
    """Return the median of several runs after a first one, in ms."""
    times = []
    with Registry.open(url) as registry:
        gc.freeze()  # as in `fleet stats`
        for _ in range(RUNS + 1):
            began = time.perf_counter()
            rows = registry.stats.per_device(since=SINCE, now=now)
            times.append((time.perf_counter() - began) * 1000)
            if len(rows) != devices or not all(row.tokens for row in rows):
                raise ConfigError(
                    f"expected counts of {devices} devices, got {sum(bool(r.tokens) for r in rows)}"
                )
    return statistics.median(times[1:])


def fill_rollups(url: str, num_devices: int, days: int) -> None:
    """Write hours one after the other, as in production, then the longer spans from them."""
    engine = open_database(url)
    names = [f"device-{i:04d}" for i in range(num_devices)]
    first = span_start(SINCE, HOUR_S)
    hours = range(first, first + days * 24 * HOUR_S, HOUR_S)
    with writing(engine).begin() as connection:
        connection.execute(
            insert(IdentityRecord), [_identity(i, name) for i, name in enumerate(names)]
        )
        connection.execute(insert(StatusRecord), [_status(name) for name in names])
    for table, rows in (
        (ROLLUPS, _rollups(names, hours)),
        (SOURCES, _sources(names, hours)),
        (SWITCHES, _switches(names, hours)),
    ):
        _load(engine, table.name, [column.name for column in table.columns], rows)
    with writing(engine).begin() as connection:
        for table in LEVELS:
            _lengthen(connection, table)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("ANALYZE"))
    engine.dispose()


def _identity(i: int, name: str) -> dict[str, Any]:
    group = f"group-{i % NUM_GROUPS:02d}"
    return {
        "name": name,
        "role": "device",
        "group": group,
        "fingerprint": "0" * 64,
        "created_at": 0.0,
        "not_after": 2e9,
        "state": "active",
    }


def _status(name: str) -> dict[str, Any]:
    return {
        "device": name,
        "online": True,
        "epoch": 1,
        "bundle_id": BUNDLE,
        "version": "0.1.0",
        "mode": "auto",
        "last_seen": SINCE,
        "config_version": 0,
        "config_error": None,
    }


Row = tuple[str | int, ...]


def _rollups(names: list[str], hours: range) -> Iterator[Row]:
    draw = random.Random(0)
    total = sum(TOKENS.values())
    for hour in hours:
        for name in names:
            counts = dict.fromkeys((*AMOUNTS, *TTFT, *TPOT), 0) | {
                "answers": ANSWERS,
                "prompt_tokens": 280,
                "tokens": total,
                "cloud_tokens": TOKENS["cloud"],
                "fallback_tokens": TOKENS["fallback"],
                "assists": 140,
                "bytes_up": draw.randrange(1 << 20),
                "bytes_down": draw.randrange(1 << 14),
            }
            for _ in range(ANSWERS):
                counts[TTFT[draw.randrange(12, 20)]] += 1
                counts[TPOT[draw.randrange(5, 11)]] += 1
            yield HOUR_S, hour, name, BUNDLE, "auto", *counts.values()


def _sources(names: list[str], hours: range) -> Iterator[Row]:
    for hour in hours:
        for name in names:
            for source in TOKENS.keys() - SUMMED.keys():
                yield HOUR_S, hour, name, BUNDLE, source, TOKENS[source]


def _switches(names: list[str], hours: range) -> Iterator[Row]:
    """Return the lost links of every device: one hour in eight."""
    for hour in hours[::8]:
        for name in names:
            yield HOUR_S, hour, name, BUNDLE, "standalone", "the link is down", 1
            yield HOUR_S, hour, name, BUNDLE, "collaborative", "the link is back", 1


def _load(engine: Engine, table: str, columns: list[str], rows: Iterator[Row]) -> None:
    """Write rows the fastest way: COPY, or one prepared INSERT."""
    with writing(engine).begin() as connection:
        cursor = connection.connection.cursor()
        if engine.name == "postgresql":
            with cursor.copy(f"COPY {table} ({', '.join(columns)}) FROM STDIN") as copy:
                for row in rows:
                    copy.write_row(row)
        else:
            insert_all: Any = cursor.executemany  # of any iterable
            names = ", ".join(columns)
            values = ", ".join("?" * len(columns))
            insert_all(f"INSERT INTO {table} ({names}) VALUES ({values})", rows)


def _lengthen(connection: Connection, table: Any) -> None:
    keys = [c.name for c in table.primary_key if c.name not in ("device", "span_s", "start")]
    amounts = [c.name for c in table.columns if not c.primary_key]
    for span_s in SPANS_S[1:]:
        start = f"start / {span_s} * {span_s}"
        sums = ", ".join(f"sum({amount})" for amount in amounts)
        columns = ", ".join((*keys, *amounts))
        groups = ", ".join(keys)
        connection.execute(
            text(
                f"INSERT INTO {table.name} (span_s, start, device, {columns}) "
                f"SELECT {span_s}, {start}, device, {groups}, {sums} "
                f"FROM {table.name} WHERE span_s = {HOUR_S} "
                f"GROUP BY device, {start}, {groups}"
            )
        )


if __name__ == "__main__":
    app()
