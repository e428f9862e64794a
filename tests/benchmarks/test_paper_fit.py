"""The planner's constants are recovered from rows of a known model."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from benchmarks.paper.fit import fit_cost_model, non_negative
from benchmarks.paper.rows import Link
from benchmarks.paper.sizes import GRID, PAPER_LINK, SIZES
from fleet.errors import ConfigError
from fleet.planning.cost_model import CostFit
from tests.benchmarks import paper_rows as known
from tests.benchmarks.paper_rows import RUN, linear_rows


@pytest.fixture(scope="module")
def exact() -> CostFit:
    return fit_cost_model(linear_rows(), RUN)[0]


def test_a_step_on_either_side_is_found(exact: CostFit) -> None:
    for side, step_ms in ((exact.edge, known.EDGE_STEP_MS), (exact.cloud, known.CLOUD_STEP_MS)):
        assert side.step_ms == pytest.approx(step_ms, rel=0.01)
        assert side.prompt_steps == pytest.approx(known.PROMPT_STEPS, rel=0.02)
        assert side.message_steps == pytest.approx(known.MESSAGE_STEPS, rel=0.05)


def test_overlapping_work_takes_a_share_of_its_time(exact: CostFit) -> None:
    settings = {setting.name: setting for setting in exact.settings}
    assert settings["standalone"].total.work == pytest.approx(1.0, rel=0.01)
    assert settings["verified"].total.work == pytest.approx(known.OVERLAP["verified"], rel=0.03)
    for name in ("collaborative@0.8", "verified"):
        assert settings[name].total.round_trip == pytest.approx(1.0, rel=0.05)


def test_counts_are_kept_by_round_trip(exact: CostFit) -> None:
    verified = next(setting for setting in exact.settings if setting.name == "verified")
    assert [counts.rtt_ms for counts in verified.counts] == [1.0, 5.0, 20.0, 50.0, 100.0]
    trips = [counts.round_trips for counts in verified.counts]
    assert trips == sorted(trips, reverse=True)
    assert trips[0] == pytest.approx(1 / 4.05, rel=0.03)
    assert verified.prompt_edge == pytest.approx(24 / 30)
    assert verified.prompt_cloud == pytest.approx(6 / 30)
    assert (verified.agreement, verified.threshold) == (1.0, None)


def test_links_that_were_held_back_are_predicted_within_15_percent() -> None:
    fitted, checked = fit_cost_model(linear_rows(noise=0.03), RUN)
    assert {(one.system, one.link) for one in checked} == {
        (s, link) for s in known.SYSTEMS for link in HELD_BACK
    }
    assert max(one.error for one in checked) < 0.15
    assert fitted.errors["held_back"] == len(checked)
    assert fitted.errors["within_15_percent"] == 1.0


HELD_BACK = sorted(GRID, key=lambda link: (link.mbit_s, link.rtt_ms))[1::2]


def test_the_plan_agrees_with_the_reference_up_to_the_first_other_token() -> None:
    rows = [
        known.row("verified", part="latency", token_ids=(1, 2, 3, 4)),
        known.row("collaborative@0.8", part="latency", token_ids=(1, 2, 9, 9)),
    ]
    fitted, _ = fit_cost_model([*linear_rows(), *rows], RUN)
    agreed = next(s.agreement for s in fitted.settings if s.name == "collaborative@0.8")
    assert agreed is not None
    assert 0.99 < agreed < 1


def test_a_small_run_has_links_enough() -> None:
    rows = list(linear_rows(SIZES["small"].links, samples=1))
    rows += [
        msgspec.structs.replace(r, system="collaborative_int8@calibrated")
        for r in rows
        if "@" in r.system
    ]
    fitted, checked = fit_cost_model(rows, RUN)
    assert {one.link for one in checked} == {PAPER_LINK}
    assert max(one.error for one in checked) < 0.15
    assert {(s.mode, s.threshold) for s in fitted.settings if "_int8" in s.name} == {
        ("collaborative", None)
    }


def test_too_few_links_or_systems_are_refused_with_what_to_run() -> None:
    with pytest.raises(
        ConfigError,
        match="over 2 links: expected 3 or more; run 'fleet bench paper --only latency'",
    ):
        fit_cost_model(linear_rows((Link(1.0, 10.0), Link(5.0, 10.0))), RUN)
    with pytest.raises(ConfigError, match="no latency rows of cloud_only"):
        fit_cost_model([row for row in linear_rows() if row.system != "cloud_only"], RUN)
    apart = [
        r
        for r in linear_rows(SIZES["small"].links)
        if (r.system == "verified") == (r.link == PAPER_LINK)
    ]
    with pytest.raises(
        ConfigError, match="no system was measured both over links to fit and over others"
    ):
        fit_cost_model(apart, RUN)


def test_least_squares_have_no_term_below_zero() -> None:
    matrix = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])
    assert non_negative(matrix, np.array([3.0, 5.0, 7.0])) == pytest.approx([1.0, 2.0])
    assert non_negative(matrix, np.array([3.0, 2.0, 1.0])) == pytest.approx([2.0, 0.0])
    assert non_negative(matrix, np.array([-1.0, -1.0, -1.0])) == [0.0, 0.0]
