"""Rows of the comparison over links: what is measured, and what a row says."""

from __future__ import annotations

import pytest

from benchmarks.drivers.answer import DriverAnswer
from benchmarks.links import OWN_SYSTEMS, cases, cells, parse_links, summarize
from benchmarks.paper.rig import Cost
from benchmarks.paper.rows import Link, Traffic
from benchmarks.paper.systems import CLOUD_ONLY
from fleet.errors import ConfigError

FAST = Link(5.0, 100.0)
SLOW = Link(100.0, 10.0)


def measured(tokens: list[int], total_ms: float) -> tuple[DriverAnswer, Cost]:
    """Return an answer of which the cloud gave the first token."""
    answer = DriverAnswer(
        prompt_tokens=3,
        token_ids=tuple(tokens),
        tokens_from={"cloud": 1, "exit:2": len(tokens) - 1},
        ttft_ms=total_ms / 2,
        total_ms=total_ms,
        round_trips=1,
    )
    traffic = Traffic(bytes_up=400, bytes_down=80, messages_up=2, messages_down=1)
    cost = Cost(
        edge_s=0.2, cloud_s=0.1, traffic=traffic, layer_positions=9, head_calls=2, joules=None
    )
    return answer, cost


def test_links_are_pairs_of_a_round_trip_and_a_bandwidth() -> None:
    assert parse_links("5:100,100:10") == [FAST, SLOW]


@pytest.mark.parametrize("text", ["", "5", "5:100:2", "a:b", "5:100,"])
def test_what_is_no_link_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"expected round trips in ms and Mbit/s, e\.g\. 5:100"):
        parse_links(text)


def test_a_system_without_a_cloud_is_measured_once() -> None:
    names = [name for _, name in cases([FAST, SLOW], OWN_SYSTEMS)]
    assert names.count("standalone") == 1
    assert names.count("verified") == names.count(CLOUD_ONLY) == 2


def test_a_row_has_medians_of_times_and_means_for_a_token() -> None:
    answers = [measured([1, 2], 100.0), measured([3, 4], 300.0), measured([5, 6], 200.0)]
    row = summarize("verified", SLOW, answers, [[1, 2], [3, 9], [9, 9]])
    assert (row.token_ms, row.first_token_ms) == (100.0, 100.0)
    assert (row.bytes_up, row.bytes_down) == (200.0, 40.0)
    assert (row.round_trips, row.from_cloud, row.as_cloud_only) == (0.5, 0.5, 0.5)
    assert row.device_cpu_ms == pytest.approx(100)
    assert row.cloud_cpu_ms == pytest.approx(50)
    assert cells(row)[:4] == ["verified", "100, 10", "100.0", "100"]


def test_a_row_without_a_cloud_has_no_link_and_one_without_the_whole_model_no_share() -> None:
    row = summarize("standalone", FAST, [measured([1, 2], 100.0)], [])
    assert (row.link, row.as_cloud_only) == (None, None)
    assert (cells(row)[1], cells(row)[-1]) == ("none", "")
