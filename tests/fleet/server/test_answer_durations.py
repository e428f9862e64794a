"""Histograms of answers' times under OpenTelemetry's names."""

from __future__ import annotations

import pytest

from fleet.server.answer_durations import MAX_BUNDLES, TIMES_METRICS, AnswerDurations
from tests.fleet.conftest import report

DURATION, FIRST_TOKEN, LATER_TOKEN = TIMES_METRICS


def test_an_answer_counts_once_in_each_histogram() -> None:
    durations = AnswerDurations()
    durations.add(report())  # 20 ms, and 9 times 5 ms
    sums = {metric: by_bundle["b1"][1] for metric, by_bundle in durations.read().items()}
    assert sums == {
        DURATION: pytest.approx(0.065),
        FIRST_TOKEN: pytest.approx(0.02),
        LATER_TOKEN: pytest.approx(0.005),
    }
    buckets, _ = durations.read()[DURATION]["b1"]
    assert buckets[0] == ("0.01", 0.0)
    assert dict(buckets)["0.08"] == 1.0
    assert buckets[-1] == ("+Inf", 1.0)


def test_an_answer_that_failed_counts_for_the_duration_alone() -> None:
    durations = AnswerDurations()
    durations.add(report(finish_reason="error"))
    totals = [by_bundle["b1"][0][-1][1] for by_bundle in durations.read().values()]
    assert totals == [1.0, 0.0, 0.0]


def test_an_answer_of_one_token_has_no_later_token() -> None:
    durations = AnswerDurations()
    durations.add(report(tokens=1, sources={"cloud": 1}))
    assert durations.read()[LATER_TOKEN]["b1"][0][-1] == ("+Inf", 0.0)
    assert durations.read()[DURATION]["b1"][1] == pytest.approx(0.02)


def test_a_report_of_several_answers_counts_for_all_of_them() -> None:
    durations = AnswerDurations()
    durations.add(report(answers=5))  # two tokens each: 20 ms, and 5 ms
    buckets, sum_s = durations.read()[DURATION]["b1"]
    assert buckets[-1] == ("+Inf", 5.0)
    assert sum_s == pytest.approx(5 * 0.025)


def test_the_bundles_with_histograms_are_bounded() -> None:
    durations = AnswerDurations()
    for i in range(MAX_BUNDLES + 3):
        durations.add(report(bundle_id=f"bundle-{i}"))
    assert len(durations.read()[DURATION]) == MAX_BUNDLES
