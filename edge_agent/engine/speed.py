"""The speed of this device with a bundle: layers, exits and prompts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Final

from fleet.bundles.instruction_sets import processor_name
from fleet.graphs.cascade import Cascade
from fleet.graphs.partition import Partition
from fleet.planning.machine_speeds import MachineSpeeds

PROMPT: Final = (1,) * 64
TOKEN: Final = (1,)
STEPS: Final = 60
ROUNDS: Final = 5
WARM_UP: Final = 5
MAX_ROUND_S: Final = 20.0
MAX_TOTAL_S: Final = 25.0
"""Limits for large models, whose first prompt alone may take half of a minute."""

Clock = Callable[[], float]


def measure_device(
    partition: Partition, num_threads: int, progress: Callable[[str], None] = lambda _: None
) -> MachineSpeeds:
    """Measure the time of a layer, of an exit and of a prompt's position."""
    meter = DeviceMeter(partition)
    for number in range(1, ROUNDS + 1):
        progress(f"round {number} of {ROUNDS}")
        meter.run_round()
        if meter.total_s > MAX_TOTAL_S:
            break
    return meter.speeds(num_threads)


class DeviceMeter:
    """Times of a device's steps, in seconds by `clock`.

    The time of the layers includes the exits' own weights, which are in the graphs of the blocks.
    """

    def __init__(self, partition: Partition, clock: Clock = time.perf_counter) -> None:
        self._partition = partition
        self._clock = clock
        self._layers_s: list[float] = []
        self._heads_s: list[float] = []
        self._prompts_s: list[float] = []
        self.total_s = 0.0

    def run_round(self, steps: int = STEPS) -> None:
        """Run a prompt twice, and some tokens after it; the first runs are not counted."""
        timer = StepTimer(self._partition, len(PROMPT) + WARM_UP + steps, self._clock)
        timer.run(PROMPT)
        timer.restart()
        self._prompts_s.append(timer.run(PROMPT))
        for _ in range(WARM_UP):
            timer.run(TOKEN)
            timer.head()
        for _ in range(steps):
            self._layers_s.append(timer.run(TOKEN))
            self._heads_s.append(timer.head())
            if timer.total_s > MAX_ROUND_S:
                break
        self.total_s += timer.total_s

    @property
    def step_ms(self) -> float:
        """The time of a token through all layers and one head."""
        return 1e3 * (median(self._layers_s) + median(self._heads_s))

    def speeds(self, num_threads: int) -> MachineSpeeds:
        """Return the medians of all rounds."""
        manifest = self._partition.manifest
        num_layers = self._partition.split
        return MachineSpeeds(
            side="device",
            model=manifest.model.name,
            weights=manifest.quantization,
            processor=processor_name(),
            num_threads=num_threads,
            layer_ms=1e3 * median(self._layers_s) / num_layers,
            head_ms=1e3 * median(self._heads_s),
            prompt_layer_ms=1e3 * median(self._prompts_s) / num_layers / len(PROMPT),
        )


class StepTimer:
    """Times of one sequence's runs."""

    def __init__(self, partition: Partition, capacity: int, clock: Clock) -> None:
        self.total_s = 0.0
        self._clock = clock
        self._blocks = range(len(partition.blocks))
        self._cascade = Cascade(partition, capacity)

    def run(self, token_ids: Sequence[int]) -> float:
        """Run tokens through all layers."""
        start = self._clock()
        self._cascade.append(token_ids)
        for block in self._blocks:
            self._cascade.fill(block)
        return self._since(start)

    def head(self) -> float:
        """Run the LM head of the deepest exit."""
        start = self._clock()
        self._cascade.run(self._blocks[-1])
        return self._since(start)

    def restart(self) -> None:
        """Drop all tokens."""
        self._cascade.truncate(0)

    def _since(self, start: float) -> float:
        seconds = self._clock() - start
        self.total_s += seconds
        return seconds
