"""Roll-ups: they hold the sums of reports for every window, and are kept longer."""

from __future__ import annotations

import random
import time

import pytest
from sqlalchemy import create_engine, select

from fleet.errors import UnknownDeviceError
from fleet.protocol.access import Role
from fleet.protocol.report import GenerationReport, Switch
from fleet.registry.database import parse_url
from fleet.registry.results import BundleStats, GroupStats, HourStats, StatsRow
from fleet.registry.stats.aggregate import MAX_AMOUNT, bucket, kind_of, quantile_ms
from fleet.registry.stats.queries import By
from fleet.registry.stats.rollup_columns import BUCKETS_MS, HOUR_S, NUM_BUCKETS, SPANS_S
from fleet.registry.stats.rollup_tables import ROLLUPS
from fleet.registry.stats.time_spans import ladder, trend_span_s, window_start
from fleet.registry.store import Registry
from fleet.server.retention import Retention
from tests.fleet.conftest import add, report

DAY_S = 24 * HOUR_S
NOW = 60.0 * DAY_S + 12_345


def scattered(number: int, days: float, seed: int = 0) -> list[GenerationReport]:
    """Return reports of the last days before NOW."""
    draw = random.Random(seed)
    return [report(f"g{i}", started_at=NOW - draw.random() * days * DAY_S) for i in range(number)]


@pytest.mark.parametrize("length_s", [1.0, 1800.0, 5000.0, 7 * 3600.0, DAY_S - 1])
def test_a_window_of_at_most_a_day_counts_exactly_the_answers_that_began_in_it(
    registry: Registry, length_s: float
) -> None:
    add(registry, "edge-1")
    reports = scattered(60, days=1.2)
    for each in reports:
        registry.stats.record_report("edge-1", each)
    (row,) = registry.stats.per_device(since=NOW - length_s, now=NOW)
    assert row.generations == sum(each.started_at >= NOW - length_s for each in reports)
    assert sum(row.sources.values()) == row.tokens == 10 * row.generations


@pytest.mark.parametrize(
    ("days", "whole_s"), [(1.1, HOUR_S), (2.3, HOUR_S), (8.0, HOUR_S), (11.0, DAY_S), (30.0, DAY_S)]
)
def test_a_longer_window_counts_from_its_whole_hour_or_day_on(
    registry: Registry, days: float, whole_s: int
) -> None:
    add(registry, "edge-1")
    reports = scattered(60, days=32)
    for each in reports:
        registry.stats.record_report("edge-1", each)
    since = NOW - days * DAY_S
    (row,) = registry.stats.per_device(since=since, now=NOW)
    assert row.generations == sum(each.started_at >= since // whole_s * whole_s for each in reports)


def test_every_length_of_span_adds_up_to_the_same(registry: Registry, registry_url: str) -> None:
    add(registry, "edge-1")
    for each in scattered(30, days=20):
        registry.stats.record_report("edge-1", each)
    engine = create_engine(parse_url(registry_url))
    with engine.connect() as connection:
        rows = connection.execute(select(ROLLUPS.c.span_s, ROLLUPS.c.answers)).all()
    engine.dispose()
    assert {
        span_s: sum(answers for each, answers in rows if each == span_s) for span_s in SPANS_S
    } == dict.fromkeys(SPANS_S, 30)


def test_a_report_that_comes_twice_is_rolled_up_once(registry: Registry) -> None:
    add(registry, "edge-1")
    for _ in range(2):
        registry.stats.record_report("edge-1", report(started_at=NOW))
    assert registry.stats.per_device(now=NOW)[0].generations == 1


def test_a_merged_report_counts_as_all_of_its_answers(registry: Registry) -> None:
    add(registry, "edge-1")
    registry.stats.record_report(
        "edge-1", report(started_at=NOW, answers=40, tokens=400, sources={"exit:8": 400})
    )
    (row,) = registry.stats.per_device(now=NOW)
    assert (row.generations, row.tokens) == (40, 400)


def test_switches_are_counted_by_mode_and_kind_of_reason(registry: Registry) -> None:
    add(registry, "edge-1")
    slow = [
        Switch(20 * i, "standalone", f"{30 + i} ms a token predicted, wanted 12.5")
        for i in range(3)
    ]
    registry.stats.record_report("edge-1", report("g1", started_at=NOW, switches=tuple(slow)))
    registry.stats.record_report(
        "edge-1",
        report("g2", started_at=NOW, switches=(Switch(1, "verified", "the link is back"),)),
    )
    for since in (None, NOW - 60):  # from roll-ups, and from the generations themselves
        (row,) = registry.stats.per_device(since=since, now=NOW + 60)
        assert row.switches == {
            "standalone: # ms a token predicted, wanted #": 3,
            "verified: the link is back": 1,
        }


def test_verifies_drafts_and_errors_are_kept(registry: Registry) -> None:
    add(registry, "edge-1")
    registry.stats.record_report("edge-1", report("g1", started_at=NOW, verifies=4, drafted=17))
    registry.stats.record_report("edge-1", report("g2", started_at=NOW, finish_reason="error"))
    (row,) = registry.stats.per_device(now=NOW)
    assert (row.verifies, row.drafted, row.errors) == (4, 17, 1)


def test_the_trend_is_the_offload_rate_of_equal_parts_oldest_first(registry: Registry) -> None:
    add(registry, "edge-1")
    noon = 60.0 * DAY_S
    for hours_ago, cloud in ((1, 0), (5, 5), (8, 10)):
        registry.stats.record_report(
            "edge-1",
            report(
                f"g{cloud}",
                started_at=noon - hours_ago * HOUR_S,
                sources={"cloud": cloud, "exit:8": 10 - cloud},
            ),
        )
    (row,) = registry.stats.per_device(since=noon - 8 * HOUR_S, now=noon)
    assert row.trend == (1.0, None, None, 0.5, None, None, None, 0.0)


def test_rows_by_group_bundle_and_hour_add_up_to_the_devices(registry: Registry) -> None:
    add(registry, "edge-1", group="kitchen")
    add(registry, "edge-2", group="kitchen")
    add(registry, "edge-3")
    for i, (device, bundle_id) in enumerate((("edge-1", "b1"), ("edge-2", "b2"), ("edge-3", "b2"))):
        registry.stats.record_report(
            device, report(started_at=NOW - i * HOUR_S, bundle_id=bundle_id)
        )
    groups = registry.stats.grouped(By.GROUP, now=NOW)
    bundles = registry.stats.grouped(By.BUNDLE, now=NOW)
    hours = registry.stats.grouped(By.HOUR, since=NOW - DAY_S, now=NOW)
    assert [(row.group, row.tokens) for row in groups if isinstance(row, GroupStats)] == [
        (None, 10),
        ("kitchen", 20),
    ]
    assert [(row.bundle_id, row.tokens) for row in bundles if isinstance(row, BundleStats)] == [
        ("b1", 10),
        ("b2", 20),
    ]
    hour = NOW // HOUR_S * HOUR_S
    assert [(row.hour_at, row.tokens) for row in hours if isinstance(row, HourStats)] == [
        (hour - 2 * HOUR_S, 10), (hour - HOUR_S, 10), (hour, 10),
    ]  # fmt: skip


@pytest.mark.parametrize("by", [By.GROUP, By.BUNDLE, By.HOUR])
def test_rows_can_be_of_one_device_or_of_a_group_alone(registry: Registry, by: By) -> None:
    add(registry, "edge-1", group="kitchen")
    add(registry, "edge-2", group="attic")
    registry.stats.record_report("edge-1", report(started_at=NOW, tokens=3, sources={"exit:8": 3}))
    registry.stats.record_report("edge-2", report(started_at=NOW))
    for since in (None, NOW - 1):
        assert [row.tokens for row in registry.stats.grouped(by, "edge-1", since, now=NOW)] == [3]
        assert [
            row.tokens for row in registry.stats.grouped(by, None, since, group="attic", now=NOW)
        ] == [10]
    assert [row.device for row in registry.stats.per_device(group="attic", now=NOW)] == ["edge-2"]
    with pytest.raises(UnknownDeviceError):
        registry.stats.grouped(by, "oven")


def test_the_past_answers_of_a_device_that_moves_count_for_its_new_group(
    registry: Registry,
) -> None:
    add(registry, "edge-1", group="kitchen")
    registry.stats.record_report("edge-1", report(started_at=NOW))
    registry.identities.add_identity(
        "edge-1", role=Role.DEVICE, group="attic", fingerprint="0", not_after=2e9, replace=True
    )
    (row,) = registry.stats.grouped(By.GROUP, now=NOW)
    assert isinstance(row, GroupStats)
    assert row.group == "attic"


def test_figures_beyond_any_answer_do_not_overflow_the_sums(registry: Registry) -> None:
    add(registry, "edge-1")
    most = 1 << 53
    for i in range(3):
        huge = report(
            f"g{i}",
            started_at=NOW,
            tokens=most,
            sources={"exit:8": most},
            bytes_up=most,
            ttft_ms=1e12,
        )
        registry.stats.record_report("edge-1", huge)
    (row,) = registry.stats.per_device(now=NOW)
    assert (row.tokens, row.bytes_up, row.ttft_p95_ms) == (
        3 * MAX_AMOUNT,
        3 * MAX_AMOUNT,
        BUCKETS_MS[-1],
    )


def test_deleted_generations_stay_in_the_statistics_of_whole_hours(registry: Registry) -> None:
    add(registry, "edge-1")
    for i in range(5):
        registry.stats.record_report("edge-1", report(f"g{i}", started_at=NOW, session=f"s{i}"))
    assert registry.stats.delete_old_generations(1.0, limit=3) == 0
    assert registry.stats.delete_old_generations(9e9, limit=3) == 3
    assert len(registry.stats.sessions()) == 2
    assert registry.stats.delete_old_generations(9e9, limit=3) == 2
    assert registry.stats.sessions() == []
    (row,) = registry.stats.per_device(now=NOW)
    assert (row.generations, row.tokens, row.sources["cloud"]) == (5, 50, 10)


def test_a_late_report_is_kept_from_its_arrival_on(registry: Registry) -> None:
    """Otherwise a report that a device sends again after its deletion would count twice."""
    add(registry, "edge-1")
    registry.stats.record_report("edge-1", report(started_at=0.0))
    assert registry.stats.delete_old_generations(recorded_before=1e9, limit=10) == 0
    assert not registry.stats.record_report("edge-1", report(started_at=0.0))


def test_retention_deletes_until_no_old_generation_is_left(registry: Registry) -> None:
    add(registry, "edge-1")
    for i in range(3):
        registry.stats.record_report("edge-1", report(f"g{i}"))
    with Retention(registry, days=-1.0):  # older than tomorrow: all
        deadline = time.monotonic() + 30
        while registry.stats.sessions():
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert isinstance(registry.stats.per_device()[0], StatsRow)
    assert registry.stats.per_device()[0].generations == 3


@pytest.mark.parametrize(
    "since", [0.0, 1.0, 3600.0, 5 * HOUR_S + 1, 3 * DAY_S + 7200, 30 * DAY_S - 1]
)
def test_a_ladder_covers_every_hour_of_its_window_once(since: float) -> None:
    end = 48 * DAY_S
    hours = [
        hour
        for step in ladder(since)
        for start in range(step.first, step.end or end, step.span_s)
        for hour in range(start, start + step.span_s, HOUR_S)
    ]
    first = -int(-since // HOUR_S) * HOUR_S
    assert hours == list(range(first, end, HOUR_S))
    assert (
        sum((((step.end or end) - step.first) // step.span_s) for step in ladder(since))
        <= 5 + 3 + 3 + 3 + 3
    )


@pytest.mark.parametrize(
    ("ago_s", "whole_s"),
    [
        (10, 1),
        (DAY_S, 1),
        (DAY_S + 1, HOUR_S),
        (8 * DAY_S, HOUR_S),
        (8 * DAY_S + 1, DAY_S),
        (30 * DAY_S, DAY_S),
    ],
)
def test_the_longer_a_window_the_rounder_its_window_start(ago_s: int, whole_s: int) -> None:
    assert window_start(NOW - ago_s, NOW) == (NOW - ago_s) // whole_s * whole_s


@pytest.mark.parametrize(
    ("length_s", "span_s"),
    [
        (60.0, HOUR_S),
        (DAY_S, HOUR_S),
        (3 * DAY_S, 6 * HOUR_S),
        (7 * DAY_S, DAY_S),
        (30 * DAY_S, 4 * DAY_S),
    ],
)
def test_a_trend_has_at_least_six_points_and_no_more_than_a_line_holds(
    length_s: float, span_s: int
) -> None:
    assert trend_span_s(length_s) == span_s
    assert length_s / span_s <= 24


def test_quantiles_of_a_histogram_are_within_a_fifth_of_the_true_ones() -> None:
    draw = random.Random(1)
    times = sorted(draw.lognormvariate(4, 1) for _ in range(2000))
    counts = [0] * NUM_BUCKETS
    for ms in times:
        counts[bucket(ms)] += 1
    for q in (0.05, 0.5, 0.95, 0.99):
        assert quantile_ms(counts, q) == pytest.approx(times[int(q * len(times))], rel=0.2)


def test_a_histogram_at_its_ends() -> None:
    assert quantile_ms([0] * NUM_BUCKETS, 0.5) is None
    assert quantile_ms([4, *[0] * (NUM_BUCKETS - 1)], 0.5) == 1.0
    assert quantile_ms([*[0] * (NUM_BUCKETS - 1), 4], 0.5) == BUCKETS_MS[-1]
    assert (bucket(0.0), bucket(2.0), bucket(2.1), bucket(1e12)) == (0, 0, 1, NUM_BUCKETS - 1)


def test_reasons_that_differ_in_numbers_alone_are_one_kind() -> None:
    assert (
        kind_of("31 ms a token predicted, verified 40, wanted 12.5")
        == "# ms a token predicted, verified #, wanted #"
    )
    assert len(kind_of("x" * 200)) == 120


def test_judged_and_agreed_tokens_count_in_a_fraction_of_an_hour_too(registry: Registry) -> None:
    add(registry, "edge-1")
    registry.stats.record_report("edge-1", report(started_at=NOW, judged=4, agreed=3))
    (row,) = registry.stats.per_device(since=NOW - 60.0, now=NOW + 60.0)
    assert (row.judged, row.agreed) == (4, 3)
