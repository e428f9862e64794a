"""The speed of a worker, by a clock that ticks once at each look."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import pytest

from cloud_broker_worker.worker.speed import (
    PROMPT,
    WARM_UP,
    RequestTimer,
    WorkerMeter,
    measure_worker,
)
from cloud_broker_worker.worker.upper_layers import UpperLayers
from fleet.bundles.manifest import Bundle


@pytest.fixture(scope="module")
def layers(tiny_bundle: Bundle) -> UpperLayers:
    return UpperLayers(tiny_bundle, num_threads=1)


def test_the_head_is_what_logits_add(layers: UpperLayers, monkeypatch: pytest.MonkeyPatch) -> None:
    times_s = {False: 0.004, True: 0.007}

    def run(self: RequestTimer, count: int, *, has_logits: bool = False) -> float:
        return times_s[has_logits] if count == 1 else 0.128

    monkeypatch.setattr(RequestTimer, "run", run)
    meter = WorkerMeter(layers)
    meter.run_round(steps=3)
    speeds = meter.speeds(1, "float32")
    assert (speeds.side, speeds.model, speeds.weights) == ("worker", "tiny", "float32")
    assert meter.step_ms == pytest.approx(7.0)
    assert speeds.layer_ms == pytest.approx(4.0 / 2)
    assert speeds.head_ms == pytest.approx(3.0)
    assert speeds.prompt_layer_ms == pytest.approx(128 / 2 / PROMPT)


def test_a_worker_of_fewer_layers_gives_the_time_of_one(
    cloud_bundle: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    upper = UpperLayers(cloud_bundle(1, 3), num_threads=1, from_layer=3)
    timer = RequestTimer(upper, 8, count().__next__)
    assert timer.run(2, has_logits=True) == 1
    monkeypatch.setattr(RequestTimer, "run", lambda *_, **__: 0.004)
    meter = WorkerMeter(upper)
    meter.run_round(steps=3)
    assert meter.speeds(1, "float32").layer_ms == pytest.approx(4.0)


def test_a_session_runs_on_position_by_position(layers: UpperLayers) -> None:
    timer = RequestTimer(layers, 8, count().__next__)
    assert [timer.run(5), timer.run(1), timer.run(2, has_logits=True)] == [1, 1, 1]
    assert timer.total_s == 3


def test_a_slow_worker_is_measured_in_fewer_rounds_and_steps(
    layers: UpperLayers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloud_broker_worker.worker.speed.MAX_ROUND_S", 0.0)
    monkeypatch.setattr("cloud_broker_worker.worker.speed.MAX_TOTAL_S", 0.0)
    runs: list[int] = []
    run = RequestTimer.run

    def counted(self: RequestTimer, count: int, *, has_logits: bool = False) -> float:
        runs.append(count)
        return run(self, count, has_logits=has_logits)

    monkeypatch.setattr(RequestTimer, "run", counted)
    assert measure_worker(layers, 1, "float32").layer_ms > 0
    assert runs == [PROMPT, *[1] * WARM_UP, 1, 1]
