"""Figures of rows that can be computed by hand, and the tables, pictures and page of them."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import msgspec
import pytest

from benchmarks.paper.accuracy_summary import Accuracy
from benchmarks.paper.figures import SystemFigures, agreement, figures, spread
from benchmarks.paper.fit import fit_cost_model
from benchmarks.paper.page import BLOCK, EMPTY, PAGE, fill_page, read_summary
from benchmarks.paper.plots import draw_figures
from benchmarks.paper.report import Summary, compared, encode, first_exit, sheets
from benchmarks.paper.rows import Link, Row, Traffic
from tests.benchmarks.paper_rows import MODEL, RUN, linear_rows, row

CLOUD = row("cloud_only", total_ms=1000.0, cloud_s=0.8, edge_s=0.0)
OURS = row(
    "collaborative@0.8",
    total_ms=750.0,
    ttft_ms=300.0,
    cloud_s=0.2,
    edge_s=0.4,
    round_trips=4,
    tokens_from={"cloud": 4, "exit:16": 5, "exit:24": 1},
    traffic=Traffic(600, 150, 8, 4),
    layer_positions_cloud=120,
    head_calls=14,
    head_calls_cloud=4,
    token_ids=(0, 1, 2, 3, 4, 9, 9, 9, 9, 9),
)
NAIVE = row("naive_split", total_ms=9000.0, traffic=Traffic(14_500, 500, 10, 10))
CACHED = row("cached_split_fp16", total_ms=1500.0, traffic=Traffic(900, 100, 10, 10))


def of(system: str, *rows: Row) -> SystemFigures:
    return next(one for one in figures(rows, MODEL) if one.system == system)


def test_the_total_is_shared_out_between_edge_cloud_and_the_rest() -> None:
    ours = of("collaborative@0.8", OURS)
    assert (ours.edge_s, ours.cloud_s) == (0.4, 0.2)
    assert ours.communication_s == pytest.approx(0.15)
    assert ours.token_ms.median == pytest.approx((750 - 300) / 9)
    assert ours.ttft_ms.median == 300
    assert (ours.bytes, ours.messages, ours.round_trips) == (750, 12, 4)


def test_tokens_are_counted_by_source_over_all_answers() -> None:
    sure = row("collaborative@0.8", sample=1, tokens_from={"exit:16": 10})
    ours = of("collaborative@0.8", OURS, sure)
    assert (ours.offload_rate, ours.confident) == (0.2, 0.8)
    assert ours.sources == {"cloud": 0.2, "exit:16": 0.75, "exit:24": 0.05}
    assert first_exit(ours) == 0.75
    assert first_exit(of("cloud_only", CLOUD)) is None


def test_work_of_the_cloud_is_two_operations_a_parameter() -> None:
    assert of("collaborative@0.8", OURS).cloud_gflop == pytest.approx(
        2e-9 * (120 * 3_538_944 + 4 * 28_311_552)
    )


def test_reductions_are_over_the_samples_that_both_have() -> None:
    alone = row("collaborative@0.8", sample=7, total_ms=1e6)
    less = of("collaborative@0.8", OURS, alone, CLOUD, NAIVE).against
    assert less["cloud_only"].total == pytest.approx(0.25)
    assert less["cloud_only"].cloud_time == pytest.approx(0.75)
    assert less["cloud_only"].bytes == pytest.approx(0.5)
    assert less["naive_split"].bytes == pytest.approx(0.95)
    assert "cached_split_fp16" not in less
    assert of("cloud_only", OURS, CLOUD).against == {}
    assert of("standalone", row("standalone", link=Link(1.0, 1.0)), CLOUD).against == {}


@pytest.mark.parametrize(
    ("cached", "fewer"),
    [
        (CACHED, True),
        (msgspec.structs.replace(CACHED, round_trips=4), False),
        (msgspec.structs.replace(CACHED, traffic=Traffic(500, 200, 1, 1)), False),
    ],
)
def test_fewer_than_the_cached_split_needs_both_bytes_and_round_trips(
    cached: Row, fewer: bool
) -> None:
    assert of("collaborative@0.8", OURS, cached).fewer_than_cached is fewer


def test_a_comparison_needs_its_baseline() -> None:
    assert compared(of("collaborative@0.8", OURS, CLOUD), "cloud_only", "total") == "25.0%"
    assert compared(of("collaborative@0.8", OURS), "cloud_only", "total") == "-"


def test_only_our_modes_are_compared_with_the_cached_split() -> None:
    assert of("cloud_only", CLOUD, CACHED).fewer_than_cached is None
    assert of("verified", row("verified")).fewer_than_cached is None


def test_texts_agree_up_to_the_first_other_token() -> None:
    assert agreement([OURS], [CLOUD]) == pytest.approx(5 / 6)
    assert agreement([CLOUD], [CLOUD]) == 1.0
    assert agreement([OURS], []) is None
    assert agreement([row(token_ids=(5,))], [CLOUD]) == 0.0


def test_a_spread_is_median_and_quartiles() -> None:
    assert msgspec.structs.astuple(spread([1.0, 2.0, 3.0, 4.0, 5.0])) == (2.0, 3.0, 4.0)
    assert msgspec.structs.astuple(spread([7.0])) == (7.0, 7.0, 7.0)


# Output.

ACCURACY = [
    Accuracy(
        dataset="boolq",
        system=name,
        metric="accuracy",
        value=value,
        low=0.5,
        high=0.7,
        num=8,
        agreement=1.0,
        details={"majority": 0.6},
        perplexity=1.5,
        offload_rate=rate,
        is_within_full=True,
    )
    for name, value, rate in (("cloud_only", 0.6, 1.0), ("collaborative@0.8", 0.55, 0.4))
]


@pytest.fixture(scope="module")
def summary() -> Summary:
    rows = [
        *(msgspec.structs.replace(each, run="r1") for each in (OURS, CLOUD, NAIVE, CACHED)),
        *linear_rows(),
    ]
    return Summary(
        run=RUN,
        figures=figures(rows, MODEL),
        accuracy=ACCURACY,
        held_back=fit_cost_model(rows, RUN)[1],
    )


def test_every_part_with_rows_has_tables(summary: Summary) -> None:
    found = sheets(summary)
    assert {name: len(tables) for name, tables in found.items()} == {
        "table": 2,
        "slow": 0,
        "published": 2,
        "latency": 4,
        "proportions": 0,
        "peers": 0,
        "accuracy": 1,
    }
    assert all(
        len(line) == len(sheet.header)
        for tables in found.values()
        for sheet in tables
        for line in sheet.rows
    )
    times, traffic = found["table"]
    ours = dict(zip(traffic.header, traffic.rows[0], strict=True))
    assert ours["fewer bytes and round trips than the cached split"] == "yes"
    assert ours["less cloud time than cloud-only"] == "75.0%"
    assert times.rows[0][-2] == "25.0%"


def test_the_papers_figures_stand_next_to_ours(summary: Summary) -> None:
    shares, claims = sheets(summary)["published"]
    rows = {line[0]: line[1:] for line in (*shares.rows, *claims.rows)}
    assert rows["collaborative@0.8"] == [
        "3.19",
        "0.75",
        "60.2%",
        "53.3%",
        "35.4%",
        "26.7%",
        "4.4%",
        "20.0%",
    ]
    assert rows["alpaca: less total time than cloud-only"] == ["13.8%", "25.0%"]
    assert rows["alpaca: tokens confident at the first exit"] == ["47.9%", "50.0%"]
    assert rows["alpaca: bytes an answer, naive split to CE-CoLLM"] == [
        "112 MB to 957 KB",
        "15.0 KB to 0.8 KB",
    ]
    assert rows["xsum: less cloud time than cloud-only"] == ["84.5%", "-"]
    (scores,) = sheets(summary)["accuracy"]
    assert [line[4] for line in scores.rows] == ["0.646", "0.658"]
    assert scores.rows[0][2:4] == ["accuracy", "0.600 (0.500 to 0.700)"]
    assert scores.rows[0][6:8] == ["0.600", "-"]


def test_the_summary_survives_its_file(summary: Summary, tmp_path: Path) -> None:
    path = tmp_path / "paper.json"
    path.write_bytes(encode(summary))
    assert read_summary(path) == summary
    shown = json.loads(path.read_bytes())
    assert set(shown) == {"run", "figures", "accuracy", "held_back"}
    assert {"system", "total_s", "cloud_s", "offload_rate", "against", "fewer_than_cached"} <= set(
        shown["figures"][0]
    )


def test_pictures_are_the_same_bytes_for_the_same_figures(summary: Summary, tmp_path: Path) -> None:
    first = draw_figures(summary, tmp_path / "a")
    again = draw_figures(summary, tmp_path / "b")
    assert list(first) == ["time", "bytes", "latency", "accuracy"]
    for name, path in first.items():
        assert path.read_bytes() == again[name].read_bytes()
        assert ET.parse(path).getroot().tag.endswith("svg")
    assert "verified" in first["latency"].read_text()


def test_the_page_shows_what_the_summary_gives() -> None:
    page = PAGE.read_text()
    assert fill_page(page, read_summary()) == page


def test_every_part_has_its_place_on_the_page(summary: Summary) -> None:
    places = [match[2] for match in BLOCK.finditer(PAGE.read_text())]
    assert places == ["conditions", *sheets(summary)]
    page = fill_page(PAGE.read_text(), summary)
    assert "**time: alpaca over 20 ms, 31 Mbit/s**" in page
    assert "![latency](paper-latency.svg)" in page
    assert page.count(EMPTY) == 3
    assert fill_page(page, None).count(EMPTY) == len(places)
