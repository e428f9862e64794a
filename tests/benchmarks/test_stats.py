"""The benchmark of the statistics, on a small fleet."""

from __future__ import annotations

import json

from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.stats import SINCE, fill_rollups
from fleet.registry.stats.rollup_columns import SPANS_S
from fleet.registry.stats.time_spans import ladder, window_start
from fleet.registry.store import Registry
from tests.postgresql import Databases

DAY_S = 86_400
DAYS = 5


def test_it_prints_the_milliseconds_of_each_database(postgresql: Databases) -> None:
    result = CliRunner().invoke(app, ["stats", "--devices", "3", "--days", "5", "--json"])
    assert result.exception is None
    times = json.loads(result.stdout)
    assert set(times) == {"sqlite_ms", "postgresql_ms"}
    assert min(times.values()) > 0


def test_the_longer_spans_hold_the_hours_and_the_window_begins_where_most_are_needed(
    registry_url: str,
) -> None:
    fill_rollups(registry_url, 2, DAYS)
    *steps, rest = ladder(window_start(SINCE, SINCE + 30 * DAY_S))
    assert [step.span_s for step in steps] == list(SPANS_S[2:-1])
    assert all(step.end == step.first + step.span_s for step in steps)
    assert rest.span_s == SPANS_S[-1]
    with Registry.open(registry_url) as registry:
        for since in (None, SINCE):
            rows = registry.stats.per_device(since=since, now=SINCE + DAYS * DAY_S)
            assert [row.generations for row in rows] == [7 * 24 * DAYS] * 2
