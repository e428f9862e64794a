"""The speed of a device, by a clock that ticks once at each look."""

from __future__ import annotations

from itertools import count

import pytest

from edge_agent.engine.speed import PROMPT, DeviceMeter, measure_device
from fleet.bundles.manifest import Bundle
from fleet.graphs.partition import Partition


def test_a_step_is_its_layers_and_one_head(tiny_bundle: Bundle) -> None:
    partition = Partition(tiny_bundle, num_threads=1)
    meter = DeviceMeter(partition, count().__next__)
    meter.run_round(steps=3)
    assert meter.step_ms == 2000.0  # a tick for the layers, one for the head
    speeds = meter.speeds(num_threads=1)
    assert (speeds.side, speeds.model, speeds.weights) == ("device", "tiny", "fp32")
    assert (speeds.layer_ms, speeds.head_ms) == (500.0, 1000.0)
    assert speeds.prompt_layer_ms == pytest.approx(500.0 / len(PROMPT))
    prompts = 2 * len(PROMPT)
    tokens = 5 + 3
    assert partition.work.positions == [prompts + tokens] * 2
    assert partition.work.head_calls == tokens


def test_a_slow_device_is_measured_in_fewer_rounds_and_steps(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    partition = Partition(tiny_bundle, num_threads=1)
    monkeypatch.setattr("edge_agent.engine.speed.MAX_ROUND_S", 0.0)
    monkeypatch.setattr("edge_agent.engine.speed.MAX_TOTAL_S", 0.0)
    lines: list[str] = []
    assert measure_device(partition, 1, lines.append).head_ms > 0
    assert lines == ["round 1 of 5"]
    assert partition.work.head_calls == 5 + 1
