"""Tokens a step, speed and round trips with proposals, against one token a step.

    fleet bench drafts [--prompts FILE] [--limit 40] [--max-new-tokens 96] [--split 24]
        [--threads 1] [--bundle DIR] [--no-verified] [--link-ms 40] [--json]

Sets are the project's trigger events and the prompts of a file, evenly spread over it. Each prompt
is answered twice, with proposals and without, in an order that changes from prompt to prompt. The
suffix tables begin empty. Answers that differ are listed with the distance of the two logits at the
first difference. The mode `verified` runs after that on a device and a worker in this process, with
tables that begin empty, too, and messages that take `--link-ms` for a round trip: the device drafts
more where a round trip takes longer. `replay` has the figures that the same answers are expected to
have with the text alone and with the tables, if a further position costs a quarter of a step.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple

import numpy as np
import typer
from msgspec import Struct, to_builtins
from msgspec.structs import replace
from rich.table import Table

from benchmarks.delayed_link import DelayedBroker
from benchmarks.draft_replay import RecordedAnswer, ReplayFigures, replay, usual_cost
from benchmarks.draft_sets import PROMPTS, DraftPrompt, file_prompts, trigger_prompts
from benchmarks.edge import machine
from benchmarks.paper.in_process import InProcessFleet
from edge_agent.engine.tokenizer import ChatTokenizer
from edge_agent.generation.combined_proposer import CombinedProposer
from edge_agent.generation.decoder import Decoder
from edge_agent.generation.generator import Generator
from edge_agent.generation.mode_controller import ModeController
from edge_agent.generation.mode_policy import Targets
from edge_agent.generation.suffix_table import SuffixTable
from edge_agent.measurements import Measurements
from fleet.bundles.manifest import Bundle
from fleet.graphs.cascade import Cascade
from fleet.graphs.partition import Partition
from fleet.protocol.messages import Sampling
from fleet.protocol.modes import DEFAULT_AGREEMENT, Mode
from fleet.server.local_fleet import DEVICE
from fleet.server.supervisor import resolve_bundle
from fleet.transport.answers import Answer
from fleet.transport.prompt_client import PromptClient
from fleet.utils.cli_runtime import run_command
from fleet.utils.console import new_console
from fleet.utils.path_options import path_option

TIE: Final = 1e-3

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


class TimedAnswer(NamedTuple):
    """An answer alone on the device; `seconds` and `num_steps` are those after the first token."""

    token_ids: list[int]
    seconds: float
    num_steps: int


class AnswerDifference(Struct, frozen=True, kw_only=True):
    """The first difference of two answers, and the distance of the logits of both tokens."""

    prompt: str
    position: int
    stepwise: int
    drafted: int
    margin: float


class SourceFigures(Struct, frozen=True, kw_only=True):
    """Proposed tokens of one source that an exit judged, and those that it chose, too."""

    judged: int
    accepted: int
    acceptance: float


class SetFigures(Struct, frozen=True, kw_only=True):
    """The figures of a set.

    `identical` is the share of answers with the same tokens in both ways; `speedup` compares tokens
    a second after the first token.
    """

    answers: int
    tokens: int
    tokens_per_step: float
    speedup: float
    stepwise_ms: float
    drafted_ms: float
    acceptance: dict[str, SourceFigures]
    replay: dict[str, ReplayFigures]
    identical: float
    differences: list[AnswerDifference]
    round_trips_per_token: float | None = None


class LoneDevice:
    """The device's half of a bundle, alone, with one suffix table for each trigger."""

    def __init__(self, bundle: Bundle, split: int, num_threads: int, max_new_tokens: int) -> None:
        self.partition = Partition(bundle, num_threads, split=split)
        self._thresholds = bundle.manifest.thresholds
        self._eos = bundle.manifest.model.eos_token_ids
        self._max_new_tokens = max_new_tokens
        self._measurements = Measurements()

    @property
    def chunk_cost(self) -> Callable[[int], float]:
        """The measured time of a chunk by its number of positions."""
        return self._measurements.chunk_cost

    def answer(self, prompt_ids: Sequence[int], proposer: CombinedProposer | None) -> TimedAnswer:
        """Return the greedy answer to a prompt."""
        decoder = Decoder(
            self.partition,
            len(prompt_ids) + self._max_new_tokens,
            self._thresholds[: len(self.partition.exits)],
            Sampling(),
            measurements=self._measurements,
            proposer=proposer,
        )
        targets = Targets(None, DEFAULT_AGREEMENT, None, None)
        modes = ModeController(Mode.STANDALONE, targets, self._measurements, deadline_ms=0)
        generator = Generator(decoder, modes, self._eos)
        tokens = generator.generate(prompt_ids, self._max_new_tokens)
        token_ids = [next(tokens).token_id]
        num_steps = decoder.num_steps
        started = time.perf_counter()
        token_ids += [token.token_id for token in tokens]
        seconds = time.perf_counter() - started
        return TimedAnswer(token_ids, seconds, decoder.num_steps - num_steps)

    def margin(self, token_ids: Sequence[int], first: int, second: int) -> float:
        """Return the distance of the logits of two tokens after `token_ids`."""
        cascade = Cascade(self.partition, len(token_ids))
        cascade.append(token_ids)
        last_block = len(self.partition.exits) - 1
        for block in range(last_block + 1):
            cascade.run(block)
        pair = np.array([first, second])
        one, other = cascade.logits_of(last_block, len(token_ids) - 1, pair)
        return float(abs(one - other))


class SetBench:
    """The answers to one set of prompts in both ways."""

    def __init__(
        self,
        device: LoneDevice,
        tokenizer: ChatTokenizer,
        chunk_cost: Callable[[int], float],
    ) -> None:
        self._device = device
        self._tokenizer = tokenizer
        self._chunk_cost = chunk_cost
        self._tables: dict[str | None, SuffixTable] = {}
        self._memories: dict[str, list[int]] = {}
        self._recorded: list[RecordedAnswer] = []
        self._pairs: list[tuple[TimedAnswer, TimedAnswer]] = []
        self._differences: list[AnswerDifference] = []

    def add(self, prompt: DraftPrompt) -> None:
        """Answer a prompt in both ways, and remember the answer."""
        prompt_ids = self._tokenizer.encode(prompt.request())
        table = self._tables.setdefault(prompt.trigger, SuffixTable())
        proposer = CombinedProposer(table, self._chunk_cost)
        if len(self._pairs) % 2:
            drafted = self._device.answer(prompt_ids, proposer)
            stepwise = self._device.answer(prompt_ids, None)
        else:
            stepwise = self._device.answer(prompt_ids, None)
            drafted = self._device.answer(prompt_ids, proposer)
        self._pairs.append((stepwise, drafted))
        self._compare(prompt.text, prompt_ids, stepwise.token_ids, drafted.token_ids)
        for source, memory in proposer.memories.items():
            judged, accepted = self._memories.get(source, [0, 0])
            self._memories[source] = [judged + memory.num_tried, accepted + memory.num_right]
        table.add([*prompt_ids, *drafted.token_ids])
        recorded = RecordedAnswer(prompt_ids, stepwise.token_ids, prompt.trigger)
        self._recorded.append(recorded)

    def figures(self) -> SetFigures:
        """Return the figures of all answers so far."""
        stepwise_s = sum(stepwise.seconds for stepwise, _ in self._pairs)
        drafted_s = sum(drafted.seconds for _, drafted in self._pairs)
        num_stepwise = sum(len(stepwise.token_ids) - 1 for stepwise, _ in self._pairs)
        num_drafted = sum(len(drafted.token_ids) - 1 for _, drafted in self._pairs)
        num_steps = sum(drafted.num_steps for _, drafted in self._pairs)
        stepwise_ms = 1e3 * stepwise_s / num_stepwise
        drafted_ms = 1e3 * drafted_s / num_drafted
        return SetFigures(
            answers=len(self._pairs),
            tokens=num_drafted + len(self._pairs),
            tokens_per_step=round(num_drafted / num_steps, 3),
            speedup=round(stepwise_ms / drafted_ms, 3),
            stepwise_ms=round(stepwise_ms, 3),
            drafted_ms=round(drafted_ms, 3),
            acceptance={name: source_figures(*counts) for name, counts in self._memories.items()},
            replay={
                "text": replay(self._recorded, usual_cost, with_tables=False),
                "text and past": replay(self._recorded, usual_cost),
            },
            identical=1 - len(self._differences) / len(self._pairs),
            differences=self._differences,
        )

    def _compare(
        self, text: str, prompt_ids: list[int], stepwise: list[int], drafted: list[int]
    ) -> None:
        pairs = zip(stepwise, drafted, strict=False)
        position = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        if position == min(len(stepwise), len(drafted)):
            return
        before = [*prompt_ids, *stepwise[:position]]
        margin = self._device.margin(before, stepwise[position], drafted[position])
        difference = AnswerDifference(
            prompt=text,
            position=position,
            stepwise=stepwise[position],
            drafted=drafted[position],
            margin=margin,
        )
        self._differences.append(difference)


def source_figures(judged: int, accepted: int) -> SourceFigures:
    """Return the figures of one source of proposals."""
    acceptance = round(accepted / judged, 3) if judged else 0.0
    return SourceFigures(judged=judged, accepted=accepted, acceptance=acceptance)


def round_trips(
    bundle: Bundle,
    prompts: Sequence[DraftPrompt],
    num_threads: int,
    max_new_tokens: int,
    *,
    link_s: float,
) -> float:
    """Return the round trips a token of verified answers; each trigger has an app of its own."""
    num_round_trips = 0
    num_tokens = 0
    with InProcessFleet(bundle, num_threads, broker=DelayedBroker(link_s)) as fleet:
        names = {prompt.trigger or "prompts" for prompt in prompts}
        clients = {name: PromptClient(fleet.connect(name)) for name in names}
        for prompt in prompts:
            request = prompt.request(mode=Mode.VERIFIED, max_new_tokens=max_new_tokens)
            answer = Answer(clients[prompt.trigger or "prompts"].ask(DEVICE, request))
            num_tokens += len(answer.token_ids)
            num_round_trips += answer.usage.round_trips
    return round(num_round_trips / num_tokens, 3)


def print_figures(sets: dict[str, SetFigures]) -> None:
    """Print the sets as a table, and the differences as lines."""
    table = Table(title="proposals against one token a step", title_justify="left")
    headers = ("set", "answers", "tokens/step", "speed-up", "trips/token", "identical", "accepted")
    for header in headers:
        table.add_column(header)
    for name, figures in sets.items():
        trips = figures.round_trips_per_token
        accepted = (f"{key} {value.acceptance:.2f}" for key, value in figures.acceptance.items())
        table.add_row(
            name,
            str(figures.answers),
            f"{figures.tokens_per_step:.2f}",
            f"{figures.speedup:.2f}",
            "" if trips is None else f"{trips:.3f}",
            f"{figures.identical:.3f}",
            ", ".join(accepted),
        )
    console = new_console()
    console.print(table)
    for figures in sets.values():
        for each in figures.differences:
            console.print(f"{each.prompt!r}: token {each.position}, margin {each.margin:.2g}")


@app.command()
def run(
    prompts: Annotated[
        Path, path_option(help="File of prompts (default: the project's own).")
    ] = PROMPTS,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Prompts of each set.")] = 40,
    max_new_tokens: Annotated[
        int, typer.Option(min=2, max=4096, help="Length limit of an answer.")
    ] = 96,
    split: Annotated[
        int | None, typer.Option(min=1, max=9999, help="Layers on the device (default: auto).")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, max=64, help="Threads of each side.")] = 1,
    bundle: Annotated[
        Path | None, path_option(help="Model bundle (default: the default model's).")
    ] = None,
    verified: Annotated[
        bool, typer.Option(help="Measure the round trips of the mode verified, too.")
    ] = True,
    link_ms: Annotated[
        float, typer.Option(min=0, max=10_000, help="Round trip of the link to the worker.")
    ] = 40.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare answers with proposals with answers of one token a step."""
    progress = partial(print, file=sys.stderr, flush=True)
    loaded = Bundle.load(resolve_bundle(bundle, progress))
    layers = loaded.manifest.split_of(split or "auto")
    device = LoneDevice(loaded, layers, threads, max_new_tokens)
    sets = {prompts.stem: file_prompts(prompts, limit), "triggers": trigger_prompts()[:limit]}
    figures = {}
    for name, members in sets.items():
        bench = SetBench(device, ChatTokenizer(loaded), device.chunk_cost)
        for number, prompt in enumerate(members, 1):
            bench.add(prompt)
            progress(f"{name}: {number} of {len(members)}")
        figures[name] = bench.figures()
    if verified:
        for name, members in sets.items():
            progress(f"{name}: verified")
            trips = round_trips(loaded, members, threads, max_new_tokens, link_s=link_ms / 1e3)
            figures[name] = replace(figures[name], round_trips_per_token=trips)
    if as_json:
        result: dict[str, Any] = {"machine": machine(), "split": layers, "threads": threads}
        result["link_ms"] = link_ms
        print(json.dumps(to_builtins({**result, "sets": figures})))
    else:
        print_figures(figures)


if __name__ == "__main__":
    run_command("fleet bench drafts", app)
