"""Whole answers at several splits: their cases, their rows, and a device that moves its split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from benchmarks.drivers.agent import AgentDriver
from benchmarks.drivers.answer import DriverAnswer
from benchmarks.drivers.local_app import LocalApp
from benchmarks.paper.rig import Cost
from benchmarks.paper.rows import Link, Traffic
from benchmarks.paper.systems import SYSTEMS
from benchmarks.split_answers import (
    AnswerCase,
    CostedAnswer,
    answer_cases,
    answer_row,
    middle_split,
    predict,
    round_trip_beyond_link_ms,
)
from edge_agent.config import AgentConfig
from edge_agent.serving.agent import Agent
from fleet.bundles.manifest import Bundle
from fleet.errors import ConfigError
from fleet.planning.cost_model import CostFit, read_fits
from fleet.planning.machine_speeds import MachineSpeeds
from fleet.planning.splits import split_fits
from fleet.transport.in_memory import InMemoryBroker

MakeTinyBundle = Callable[..., Bundle]
LINKS = (Link(20.0, 31.0), Link(100.0, 31.0))
DEVICE = MachineSpeeds(
    side="device",
    model="tiny",
    weights="fp32",
    processor="p",
    num_threads=1,
    layer_ms=1.0,
    head_ms=2.0,
    prompt_layer_ms=0.5,
)
WORKER = MachineSpeeds(
    side="worker",
    model="tiny",
    weights="float32",
    processor="p",
    num_threads=1,
    layer_ms=3.0,
    head_ms=4.0,
    prompt_layer_ms=0.5,
)


@pytest.fixture(scope="module")
def bundle(make_tiny_bundle: MakeTinyBundle) -> Bundle:
    """Splits after 1, 2 and 3 of four layers, without a calibration."""
    return make_tiny_bundle((1, 2, 3), upload_layer=(1, 2, 3))


COST = Cost(
    edge_s=0.0,
    cloud_s=0.0,
    traffic=Traffic(bytes_up=0, bytes_down=0, messages_up=0, messages_down=0),
    layer_positions=0,
    head_calls=0,
    joules=None,
)
STANDALONE = AnswerCase(1, "standalone", 0.0, 0.0)
VERIFIED = AnswerCase(2, "verified", 20.0, 31.0)


def answer(total_ms: float, round_trips: int = 0) -> CostedAnswer:
    result = DriverAnswer(
        prompt_tokens=10,
        token_ids=(1, 2, 3, 4),
        tokens_from={},
        ttft_ms=1.0,
        total_ms=total_ms,
        round_trips=round_trips,
    )
    return result, COST


@pytest.fixture(scope="module")
def fits(bundle: Bundle) -> tuple[CostFit, ...]:
    return split_fits(bundle.manifest, DEVICE, WORKER, read_fits()[0])


def test_each_split_has_each_mode_over_each_link(bundle: Bundle) -> None:
    cases = list(answer_cases(bundle.manifest, LINKS))
    assert [(case.layers, case.mode, case.rtt_ms) for case in cases[:3]] == [
        (1, "standalone", 0.0),
        (1, "verified", 20.0),
        (1, "verified", 100.0),
    ]
    assert {case.layers for case in cases} == {1, 2, 3}
    assert all(case.system in SYSTEMS for case in cases)


def test_the_constants_are_those_of_the_middle_split(bundle: Bundle, tiny_bundle: Bundle) -> None:
    assert middle_split(bundle.manifest) == 2
    with pytest.raises(ConfigError, match="has 1 upload layers below its last one"):
        middle_split(tiny_bundle.manifest)


def test_a_row_compares_medians_with_the_planners_sum(fits: tuple[CostFit, ...]) -> None:
    expected_s = (10 * 0.5 * 1 + 4 * (1.0 + 2.0)) / 1e3
    answers = [answer(20.0), answer(10.0), answer(900.0)]
    row = answer_row(STANDALONE, answers, fits, fitted=2, round_trip_ms=50.0)
    assert row.measured_s == pytest.approx(0.02)
    assert row.predicted_s == pytest.approx(expected_s, rel=0.05)  # no round trip
    assert row.error == pytest.approx(row.predicted_s / 0.02 - 1)
    assert row.is_held_back
    assert not answer_row(VERIFIED, [answer(20.0, 4)], fits, 2, 0.0).is_held_back


def test_a_prediction_at_measured_round_trips_has_as_many(fits: tuple[CostFit, ...]) -> None:
    own, _ = answer(200.0, round_trips=2)
    expected = predict(fits, VERIFIED, own, 0.0)
    assert expected.round_trips == pytest.approx(4)  # one a token without a calibration
    measured = predict(fits, VERIFIED, own, 0.0, at_measured_trips=True)
    assert measured.round_trips == pytest.approx(2)
    saved_ms = expected.total_ms - measured.total_ms
    assert saved_ms > 2 * (20.0 + WORKER.step_ms(2))  # messages cost time, too


def test_the_time_beyond_the_link_is_that_of_the_split_of_the_speeds(
    fits: tuple[CostFit, ...],
) -> None:
    own, _ = answer(0.0, round_trips=2)
    total_ms = predict(fits, VERIFIED, own, 30.0, at_measured_trips=True).total_ms
    answers = {
        VERIFIED: [answer(total_ms, 2)],
        STANDALONE: [answer(900.0)],
        replace(VERIFIED, layers=1): [answer(900.0, 2)],
    }
    assert round_trip_beyond_link_ms(fits, answers, 2) == pytest.approx(30.0, rel=0.01)
    assert round_trip_beyond_link_ms(fits, {STANDALONE: [answer(900.0)]}, 1) == 0.0


def test_a_driver_moves_the_split_between_answers(bundle: Bundle) -> None:
    config = AgentConfig(num_threads=1)
    with InMemoryBroker().connect("edge-1") as link:
        app = LocalApp(link)
        with Agent(app, bundle, config) as agent:
            driver = AgentDriver(agent, app, bundle.manifest, config)
            whole = driver.answer("Hi", 3, "standalone", (1.0,) * 3)
            driver.move(1)
            moved = driver.answer("Hi", 3, "standalone", (1.0,) * 3)
    assert whole["layer_positions"] == 3 * moved["layer_positions"] > 0
