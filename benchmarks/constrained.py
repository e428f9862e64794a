"""Answers of a given form: ten schemas, 20 prompts each, in every mode, with a real model.

    python -m benchmarks constrained [--mode verified] [--first 40] [--limit 20]

Device and worker are as deployed, in one process. Half of the answers are greedy, half are sampled.
Each answer is parsed and checked by `jsonschema`, and each verified one is compared with the whole
model under the same mask (`benchmarks.whole_model`). The status is 1 if an answer is not valid, or
a verified one is not the whole model's.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple

import jsonschema
import msgspec
import numpy as np
import typer

from benchmarks.paper.in_process import FleetAnswer, InProcessFleet
from benchmarks.whole_model import WholeModel
from edge_agent.generation.decoder import Decoder
from fleet.bundles.manifest import Bundle
from fleet.constraints.grammars import bundle_grammars
from fleet.graphs.partition import Partition
from fleet.protocol.constraint import Constraint, JsonSchemaFormat, ResponseFormat
from fleet.protocol.messages import ChoiceRules, Sampling
from fleet.protocol.modes import CLOUD, Mode
from fleet.protocol.prompt import PromptRequest
from fleet.server.supervisor import resolve_bundle
from fleet.utils.path_options import path_option

FORMS: Final = Path(__file__).parent / "data" / "forms.json"
MAX_NEW_TOKENS: Final = 160
NUM_TIMED: Final = 20  # answers whose steps are timed

app = typer.Typer(add_completion=False)


def make_requests(first: int, limit: int) -> list[PromptRequest]:
    """Return `limit` requests from `first` on: for each topic one of each form, greedy and sampled
    by turns.
    """
    content = json.loads(FORMS.read_text(encoding="utf-8"))
    pairs = ((topic, form) for topic in content["topics"] for form in content["forms"])
    return [
        make_request(form["prompt"].format(topic), form["schema"], number)
        for number, (topic, form) in islice(enumerate(pairs), first, first + limit)
    ]


def make_request(prompt: str, schema: dict[str, Any], number: int) -> PromptRequest:
    """Return a request for an answer of this schema."""
    return PromptRequest(
        prompt=prompt,
        response_format=ResponseFormat(
            type="json_schema", json_schema=JsonSchemaFormat(schema=schema)
        ),
        max_new_tokens=MAX_NEW_TOKENS,
        temperature=0.8 * (number // 10 % 2),
        seed=number,
    )


def is_valid(request: PromptRequest, text: str) -> bool:
    """Return whether a text is JSON of the request's schema."""
    assert request.response_format is not None
    try:
        jsonschema.validate(
            json.loads(text),
            request.response_format.schema or {},
            format_checker=jsonschema.FormatChecker(),
        )
    except (json.JSONDecodeError, jsonschema.ValidationError):
        return False
    return True


class ConstrainedAnswer(NamedTuple):
    """An answer's constraint and tokens."""

    constraint: Constraint
    token_ids: tuple[int, ...]


@dataclass
class ModeResult:
    """The answers of one mode; `bad` are texts that are not valid or not the whole model's."""

    mode: Mode
    num_answers: int = 0
    num_valid: int = 0
    num_tokens: int = 0
    num_whole: int = 0
    seconds: float = 0.0
    sources: Counter[str] = field(default_factory=Counter)
    answers: list[ConstrainedAnswer] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)

    def add(self, request: PromptRequest, answer: FleetAnswer, *, is_whole: bool) -> None:
        """Count an answer."""
        assert request.constraint is not None
        valid = is_valid(request, answer.text)
        self.num_answers += 1
        self.num_valid += valid
        self.num_whole += is_whole
        self.num_tokens += len(answer.token_ids)
        self.sources.update(answer.tokens_from)
        self.answers.append(ConstrainedAnswer(request.constraint, answer.token_ids))
        if not valid or not (is_whole or self.mode is not Mode.VERIFIED):
            self.bad.append(f"{request.prompt!r}: {answer.text!r}")

    def line(self) -> str:
        """Return a row of the table."""
        whole = f"{self.num_whole}" if self.mode is Mode.VERIFIED else "-"
        offloaded = self.sources[CLOUD] / self.num_tokens
        return (
            f"{self.mode:13} {self.num_answers:7} {self.num_valid:6} {whole:>13} "
            f"{self.num_tokens:7} {offloaded:9.0%} {1000 * self.seconds / self.num_tokens:9.1f}"
        )


def run_mode(
    fleet: InProcessFleet, whole: WholeModel | None, mode: Mode, requests: Sequence[PromptRequest]
) -> ModeResult:
    """Ask every request in a mode, and compare the answers with those of `whole`."""
    result = ModeResult(mode)
    for request in requests:
        started = time.perf_counter()
        answer = fleet.ask(msgspec.structs.replace(request, mode=mode))
        result.seconds += time.perf_counter() - started
        result.add(request, answer, is_whole=whole is not None and is_same(whole, request, answer))
    return result


def is_same(whole: WholeModel, request: PromptRequest, answer: FleetAnswer) -> bool:
    """Return whether an answer has the tokens of the whole model under the same mask."""
    rules = request.choice_rules(prompt_length=0)
    expected = whole.generate(request.prompt or "", MAX_NEW_TOKENS, request.sampling, rules)
    return tuple(expected) == answer.token_ids


def measure_masks(bundle: Bundle, answers: Sequence[ConstrainedAnswer]) -> str:
    """Return the times to compile the constraints of answers, and of the mask of each token."""
    grammars = bundle_grammars(bundle)
    grammars.constrain(Constraint("regex", b"a"), 0)  # reads the tokenizer
    compile_ms: list[float] = []
    mask_us: list[float] = []
    for constraint, token_ids in answers:
        started = time.perf_counter()
        rule = grammars.constrain(constraint, 0)
        compile_ms.append(1e3 * (time.perf_counter() - started))
        for number in range(len(token_ids)):
            started = time.perf_counter()
            rule.allowed(token_ids[:number])
            mask_us.append(1e6 * (time.perf_counter() - started))
    mean = np.mean(mask_us)
    high = np.percentile(mask_us, 99)
    return (
        f"compilation: at most {max(compile_ms):.1f} ms; "
        f"mask of a token: mean {mean:.0f} us, 99th percentile {high:.0f} us"
    )


def measure_steps(bundle: Bundle, answers: Sequence[ConstrainedAnswer], num_threads: int) -> str:
    """Return the median time of the device's step with and without the constraint, by turns.

    The tokens are those of `answers`. The difference is the median one of two steps that follow
    each other.
    """
    partition = Partition(bundle, num_threads)
    times_ms = [pair for answer in answers for pair in step_pairs(bundle, partition, answer)]
    plain_ms = np.median([plain for plain, _ in times_ms])
    difference_ms = np.median([limited - plain for plain, limited in times_ms])
    return (
        f"step of the device: {plain_ms:.2f} ms, constrained {difference_ms:+.2f} ms "
        f"({difference_ms / plain_ms:+.1%}), {len(times_ms)} tokens"
    )


def step_pairs(
    bundle: Bundle, partition: Partition, answer: ConstrainedAnswer
) -> Iterator[tuple[float, float]]:
    """Return for each token of an answer the milliseconds without and with the constraint."""
    rules = ChoiceRules(constraint=answer.constraint, prompt_length=1)
    constraint = bundle_grammars(bundle).constrain(answer.constraint, 1)
    capacity = 1 + len(answer.token_ids)
    thresholds = bundle.manifest.thresholds
    plain = Decoder(partition, capacity, thresholds, Sampling())
    limited = Decoder(
        partition, capacity, thresholds, Sampling(), rules=rules, constraint=constraint
    )
    for token_id in (bundle.manifest.model.eos_token_ids[0], *answer.token_ids[:-1]):
        yield step_ms(plain, token_id), step_ms(limited, token_id)


def step_ms(decoder: Decoder, token_id: int) -> float:
    """Return the milliseconds of one step."""
    decoder.text.append(token_id)
    started = time.perf_counter()
    decoder.choose()
    return 1e3 * (time.perf_counter() - started)


@app.command()
def run(
    mode: Annotated[list[Mode] | None, typer.Option(help="Modes (default: all).")] = None,
    first: Annotated[int, typer.Option(min=0, max=199, help="Prompts to leave out.")] = 0,
    limit: Annotated[int, typer.Option(min=1, max=200, help="Number of prompts.")] = 200,
    threads: Annotated[int, typer.Option(min=1, max=64, help="Threads of each side.")] = 1,
    bundle: Annotated[
        Path | None, path_option(help="Model bundle (default: the default model's).")
    ] = None,
) -> None:
    """Check answers of ten schemas in every mode, and print the cost of the masks."""
    loaded = Bundle.load(resolve_bundle(bundle, lambda line: print(line, file=sys.stderr)))
    requests = make_requests(first, limit)
    print("mode          answers  valid  whole model's  tokens  offloaded  ms/token", flush=True)
    num_bad = 0
    with InProcessFleet(loaded, threads) as fleet:
        for each in mode or Mode:
            whole = WholeModel(loaded, threads) if each is Mode.VERIFIED else None
            result = run_mode(fleet, whole, each, requests)
            print(result.line(), *result.bad, sep="\n", flush=True)
            num_bad += len(result.bad)
    print(measure_masks(loaded, result.answers))
    print(measure_steps(loaded, result.answers[:NUM_TIMED], threads))
    raise typer.Exit(1 if num_bad else 0)
