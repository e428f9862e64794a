"""The worker's benchmark on the tiny model: recordings are the whole model's, and a replay asks
what they say.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.plots import plot_devices
from benchmarks.recordings import AnswerRecording, record_answers, recorded_offload_rate
from benchmarks.replay import ReplayDevice, ReplayWorker
from benchmarks.whole_model import WholeModel
from benchmarks.worker import SESSIONS, SessionSteps, highest_within, step_ms_by_weights
from cloud_broker_worker.worker.config import WorkerConfig
from cloud_broker_worker.worker.upper_layers import UpperLayers
from fleet.bundles.manifest import Bundle
from fleet.protocol.hidden_states import Float16

PROMPTS = ("How warm is it?", "Say something about rivers.")
NUM_TOKENS = 8
STEP_S = 0.25


@pytest.fixture(scope="module")
def upper(tiny_bundle: Bundle) -> UpperLayers:
    return UpperLayers(tiny_bundle, 1)


@pytest.fixture(scope="module")
def recordings(tiny_bundle: Bundle, upper: UpperLayers) -> list[AnswerRecording]:
    return record_answers(tiny_bundle, upper, PROMPTS, NUM_TOKENS, lambda _: None)


def uploads(recording: AnswerRecording) -> Float16:
    return recording.hidden_states


def ticks() -> Callable[[], float]:
    """A clock on which everything takes `STEP_S` seconds."""
    counter = itertools.count()
    return lambda: STEP_S * next(counter)


def worker_of(upper: UpperLayers, budget_bytes: int = 1 << 30) -> ReplayWorker:
    return ReplayWorker(upper, WorkerConfig(num_threads=1, kv_budget_bytes=budget_bytes), ticks())


def replay(
    upper: UpperLayers, recordings: list[AnswerRecording], thresholds: tuple[float, ...]
) -> ReplayDevice:
    device = ReplayDevice(
        name="d1",
        bundle_id=upper.manifest.bundle_id,
        rows=uploads,
        thresholds=thresholds,
        works=False,
    )
    worker = worker_of(upper)
    worker.serve([(device, device.run(recordings))])
    assert not worker.engine.sessions
    worker.engine.check_integrity()
    return device


def test_a_recording_is_the_whole_models_answer(
    tiny_bundle: Bundle, recordings: list[AnswerRecording]
) -> None:
    whole = WholeModel(tiny_bundle, num_threads=1)
    for prompt, recording in zip(PROMPTS, recordings, strict=True):
        answer = recording.token_ids[recording.num_prompt :]
        assert recording.num_answer == NUM_TOKENS
        assert len(recording.hidden_states) == len(recording.token_ids)
        assert answer == whole.generate(prompt, NUM_TOKENS - 1)[: len(answer)]


def test_the_offload_rate_is_that_of_the_exits_that_are_sure(
    recordings: list[AnswerRecording],
) -> None:
    assert recorded_offload_rate(recordings, (1.0, 1.0)) == 1.0
    assert recorded_offload_rate(recordings, (0.0, 1.0)) == 0.0
    middle = sorted(c[0] for r in recordings for c in r.confidence)[NUM_TOKENS]
    assert recorded_offload_rate(recordings, (middle, 1.0)) == pytest.approx(0.5)


def test_a_device_with_all_exits_off_waits_for_the_worker_at_every_token(
    upper: UpperLayers, recordings: list[AnswerRecording]
) -> None:
    device = replay(upper, recordings, (1.0, 1.0))
    assert len(device.answers) == len(PROMPTS)
    assert len(device.tokens) == len(PROMPTS) * (NUM_TOKENS - 1)
    assert min(seconds for _, seconds in device.tokens) >= STEP_S


def test_a_device_whose_exits_are_always_sure_never_waits(
    upper: UpperLayers, recordings: list[AnswerRecording]
) -> None:
    device = replay(upper, recordings, (0.0, 0.0))
    assert len(device.tokens) == len(PROMPTS) * (NUM_TOKENS - 1)
    assert {seconds for _, seconds in device.tokens} == {0.0}


def test_right_guesses_share_round_trips_and_their_steps_go_on_meanwhile(
    upper: UpperLayers, recordings: list[AnswerRecording]
) -> None:
    recording = recordings[0]
    taken = {}
    answer = recording.token_ids[recording.num_prompt :]
    for is_right in (True, False):
        guesses = [token_id if is_right else token_id ^ 1 for token_id in [*answer, 0]]
        told = replace(recording, guesses=guesses, seconds=[[0.04, 0.06]] * NUM_TOKENS)
        device = ReplayDevice(
            name="d1", bundle_id=upper.manifest.bundle_id, rows=uploads, thresholds=(1.0, 1.0)
        )
        worker_of(upper).serve([(device, device.run([told]))])
        assert len(device.tokens) == NUM_TOKENS - 1
        taken[is_right] = sum(seconds for _, seconds in device.tokens)
    assert taken[True] < 0.8 * taken[False]


def test_a_refusal_ends_the_measurement(
    upper: UpperLayers, recordings: list[AnswerRecording]
) -> None:
    device = ReplayDevice(
        name="d1", bundle_id=upper.manifest.bundle_id, rows=uploads, thresholds=(1.0, 1.0)
    )
    with pytest.raises(RuntimeError, match="refused d1: busy"):
        worker_of(upper, budget_bytes=1).serve([(device, device.run(recordings))])


def test_the_plot_has_a_mark_for_each_threshold() -> None:
    curve = [{"offload_rate": 0.5, "devices": 6}, {"offload_rate": 1.0, "devices": 4}]
    result = {"p95_ms": 100.0, "devices": {"cloud_only": {"devices": 2}, "curve": curve}}
    (axes,) = plot_devices(result).axes
    marks, streams = (np.array(line.get_data()) for line in axes.lines)
    np.testing.assert_array_equal(marks, [[0.5, 1.0], [6, 4]])
    np.testing.assert_array_equal(streams[1], 2)


def test_the_highest_number_within_a_limit_is_found_to_a_sixteenth() -> None:
    asked = []

    def measure(number: int) -> float:
        asked.append(number)
        return number / 10

    number, points = highest_within(10.0, measure)
    assert 94 <= number <= 100
    assert points == {n: n / 10 for n in asked}
    assert highest_within(0.05, measure)[0] == 0


def test_each_step_runs_one_position_of_each_session(upper: UpperLayers) -> None:
    steps = SessionSteps(upper, 3)
    before = [lease.length for lease in steps.leases]
    assert steps.time_step() > 0
    assert [lease.length for lease in steps.leases] == [length + 1 for length in before]


def test_the_time_of_a_step_is_reported_for_each_kind_of_weights(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.worker.NUM_STEPS", 2)
    monkeypatch.setattr("benchmarks.worker.NUM_WARM_UP", 1)
    times = step_ms_by_weights(tiny_bundle, 1, lambda _: None)
    assert set(times) == {"float32", "bfloat16", "int8", "int4"}
    assert all(list(row) == [str(number) for number in SESSIONS] for row in times.values())
