"""The speed of this worker with a bundle: layers, LM head and prompts."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Final

import numpy as np

from cloud_broker_worker.worker.config import Weights
from cloud_broker_worker.worker.upper_layers import Chunk, UpperLayers
from fleet.bundles.instruction_sets import processor_name
from fleet.planning.machine_speeds import MachineSpeeds

PROMPT: Final = 64
STEPS: Final = 20
ROUNDS: Final = 5
WARM_UP: Final = 3
MAX_ROUND_S: Final = 20.0
MAX_TOTAL_S: Final = 25.0
"""Limits for large models, whose first prompt alone may take half of a minute."""
MIN_HEAD_MS: Final = 1e-6
POOL_BYTES: Final = 1 << 40  # never reached: there is one lease at a time

Clock = Callable[[], float]


def measure_worker(
    layers: UpperLayers,
    num_threads: int,
    weights: Weights,
    progress: Callable[[str], None] = lambda _: None,
) -> MachineSpeeds:
    """Measure the time of a layer, of the LM head and of a prompt's position."""
    meter = WorkerMeter(layers)
    for number in range(1, ROUNDS + 1):
        progress(f"round {number} of {ROUNDS}")
        meter.run_round()
        if meter.total_s > MAX_TOTAL_S:
            break
    return meter.speeds(num_threads, weights)


class WorkerMeter:
    """Times of a worker's steps, in seconds by `clock`."""

    def __init__(self, layers: UpperLayers, clock: Clock = time.perf_counter) -> None:
        self._layers = layers
        self._clock = clock
        self._layers_s: list[float] = []
        self._steps_s: list[float] = []
        self._prompts_s: list[float] = []
        self.total_s = 0.0

    def run_round(self, steps: int = STEPS) -> None:
        """Run a prompt and some positions of a new session, each second one with its logits."""
        capacity = PROMPT + WARM_UP + 2 * steps
        timer = RequestTimer(self._layers, capacity, self._clock)
        self._prompts_s.append(timer.run(PROMPT))
        for _ in range(WARM_UP):
            timer.run(1, has_logits=True)
        for _ in range(steps):
            self._layers_s.append(timer.run(1))
            self._steps_s.append(timer.run(1, has_logits=True))
            if timer.total_s > MAX_ROUND_S:
                break
        self.total_s += timer.total_s

    @property
    def step_ms(self) -> float:
        """The time of a position through all layers and the LM head."""
        return 1e3 * median(self._steps_s)

    def speeds(self, num_threads: int, weights: Weights) -> MachineSpeeds:
        """Return the medians of all rounds."""
        manifest = self._layers.manifest
        num_layers = manifest.model.num_layers - self._layers.upload_layers[0]
        layers_ms = 1e3 * median(self._layers_s)
        return MachineSpeeds(
            side="worker",
            model=manifest.model.name,
            weights=weights,
            processor=processor_name(),
            num_threads=num_threads,
            layer_ms=layers_ms / num_layers,
            head_ms=max(MIN_HEAD_MS, self.step_ms - layers_ms),
            prompt_layer_ms=1e3 * median(self._prompts_s) / num_layers / PROMPT,
        )


class RequestTimer:
    """Times of one session's requests."""

    def __init__(self, layers: UpperLayers, capacity: int, clock: Clock) -> None:
        self.total_s = 0.0
        self._layers = layers
        self._clock = clock
        self._hidden_size = layers.manifest.model.hidden_size
        first_layer = layers.upload_layers[0] - layers.manifest.upload_layer
        self._lease = layers.new_pool(POOL_BYTES).lease(capacity, first_layer)
        self._random = np.random.default_rng(0)

    def run(self, count: int, *, has_logits: bool = False) -> float:
        """Run the next positions, with logits for the last of them or none."""
        start = self._lease.length
        stop = start + count
        rows = self._random.standard_normal((count, self._hidden_size)).astype(np.float16)
        chunk = Chunk(self._lease, rows, start, stop, [stop - 1] if has_logits else [])
        begin = self._clock()
        self._layers([chunk])
        seconds = self._clock() - begin
        self.total_s += seconds
        return seconds
