"""Whole models in engines that take turns, round by round: steps, prompts, fidelity."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from statistics import median, quantiles
from typing import Any, Final

from benchmarks import footprint
from benchmarks.engines import EngineProcess
from benchmarks.fidelity import ReferenceAnswer, token_agreement
from fleet.bundles.instruction_sets import instruction_sets

SPEED_PROMPT: Final = 64
SPEED_TOKENS: Final = 128
PREFILLS: Final = (64, 512, 1024)
PREFILL: Final = 512

EngineName = tuple[str, str]
Figures = dict[str, Any]
Rates = dict[EngineName, list[float]]
Progress = Callable[[str], None]


def token_ids(num_tokens: int) -> list[int]:
    """Return a prompt of ids that every model has."""
    return [100 + i % 256 for i in range(num_tokens)]


def speed_quartiles(values: Sequence[float]) -> dict[str, float]:
    """Return median and quartiles."""
    low, middle, high = (
        quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    )
    return {"tokens_per_s": middle, "tokens_per_s_low": low, "tokens_per_s_high": high}


def prefill_figures(rates: Mapping[int, Sequence[float]]) -> Figures:
    """Return the medians of prompts by their positions, that of `PREFILL` also by itself."""
    medians = {str(length): median(values) for length, values in rates.items()}
    return {"prefill_tokens_per_s": medians.get(str(PREFILL)), "prefill": medians}


class EngineRounds:
    """The engines of one number of threads.

    `versions` are known while they run, and `idle_percent` is the highest share of a core that the
    engines which did not have their turn used together.
    """

    def __init__(self, num_rounds: int, threads: int, progress: Progress) -> None:
        self.versions: dict[str, str] = {}
        self.idle_percent = 0.0
        self._num_rounds = num_rounds
        self._threads = threads
        self._progress = progress
        self._engines: dict[EngineName, EngineProcess] = {}

    @contextmanager
    def running(self, commands: Mapping[EngineName, Sequence[str]]) -> Iterator[None]:
        """Run the engines in the block."""
        with ExitStack() as stack:
            for key, command in commands.items():
                self._progress(f"starting {' '.join(key)} with {self._threads} threads")
                engine = stack.enter_context(EngineProcess(" ".join(key), command))
                self._engines[key] = engine
                self.versions[key[0]] = engine.version
            yield

    def built_for(self) -> dict[EngineName, Figures]:
        """Return the instruction sets of each engine; the machine's where it chooses."""
        own = list(instruction_sets())
        return {
            key: {"instruction_sets": list(engine.instruction_sets) or own}
            for key, engine in self._engines.items()
        }

    def speed(self) -> dict[EngineName, Figures]:
        """Return the speed of single steps after a prompt."""
        options = {"prompt": token_ids(SPEED_PROMPT), "new_tokens": SPEED_TOKENS}
        rates = self._take_turns("speed", options, "speed")
        return {key: speed_quartiles(values) for key, values in rates.items()}

    def prefill(self, lengths: Sequence[int] = PREFILLS) -> dict[EngineName, Figures]:
        """Return the speed of prompts of several lengths."""
        by_length = {
            length: self._take_turns(
                "prefill", {"prompt": token_ids(length)}, f"prompts of {length} positions"
            )
            for length in lengths
        }
        return {
            key: prefill_figures({length: rates[key] for length, rates in by_length.items()})
            for key in self._engines
        }

    def fidelity(self, answers: Sequence[ReferenceAnswer]) -> dict[EngineName, float]:
        """Return the agreement of each engine with the model's own answers."""
        agreements = {}
        for key, engine in self._engines.items():
            self._progress(f"fidelity of {engine.name}")
            agreements[key] = token_agreement(engine, answers)
        return agreements

    def _take_turns(self, op: str, options: Mapping[str, Any], title: str) -> Rates:
        """Return the rates of each engine, one a round; the first round warms up."""
        rates: Rates = {key: [] for key in self._engines}
        for number in range(self._num_rounds + 1):
            self._progress(
                f"{title} with {self._threads} threads, round {number} of {self._num_rounds}"
            )
            for key, engine in self._engines.items():
                with self._others_idle(engine):
                    rates[key].append(engine.ask(op, **options)["tokens_per_s"])
        return {key: values[1:] for key, values in rates.items()}

    @contextmanager
    def _others_idle(self, active: EngineProcess) -> Iterator[None]:
        """Record the share of a core that the other engines use in the block."""
        pids = [engine.pid for engine in self._engines.values() if engine is not active]
        before = sum(map(footprint.cpu_seconds, pids))
        start = time.monotonic()
        yield
        used = sum(map(footprint.cpu_seconds, pids)) - before
        percent = 100 * used / (time.monotonic() - start)
        self.idle_percent = max(self.idle_percent, percent)
