"""Scored answers of our modes and of the models that they stand for (ADR 0024).

The agent and the worker answer as deployed, on an in-memory broker. A first token needs no answer:
all thresholds decide on the same exits and logits.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, Final

import msgspec
import torch
from tokenizers import Tokenizer
from torch import Tensor

from benchmarks.graphs import whole_model
from benchmarks.paper.full_model import FullModel, Reading
from benchmarks.paper.in_process import FleetAnswer, InProcessFleet
from benchmarks.paper.rows import RowFile, Scored
from benchmarks.paper.scores import rouge, word_f1
from benchmarks.paper.sizes import Size
from benchmarks.paper.systems import CLOUD_ONLY
from benchmarks.paper.tasks import TASKS, Sample
from edge_agent.config import AgentConfig
from edge_agent.engine.tokenizer import ChatTokenizer
from fleet.bundles.manifest import Bundle, Manifest
from fleet.errors import ConfigError
from fleet.exits.exit_policy import exit_emits
from fleet.graphs.partition import ExitCandidates
from fleet.protocol.modes import CLOUD, Mode, exit_source
from fleet.protocol.prompt import ChatMessage, PromptRequest
from onnx_export.config import DEFAULT_MODEL

FULL: Final = "full"
VERIFIED: Final = "verified"
MAX_POSITIONS: Final = 1024  # nine prompts in ten fit; a few long ones need most of the time
TIE: Final = 1e-3  # rounding in another batch may swap logits this close

MODES: Final = {
    FULL: PromptRequest(mode=Mode.COLLABORATIVE, threshold=1.0),
    "collaborative@0.7": PromptRequest(mode=Mode.COLLABORATIVE, threshold=0.7),
    "collaborative@0.8": PromptRequest(mode=Mode.COLLABORATIVE, threshold=0.8),
    "collaborative@0.9": PromptRequest(mode=Mode.COLLABORATIVE, threshold=0.9),
    "collaborative@calibrated": PromptRequest(mode=Mode.COLLABORATIVE),
    VERIFIED: PromptRequest(mode=Mode.VERIFIED),
    "standalone": PromptRequest(mode=Mode.STANDALONE),
}
SYSTEMS: Final = (CLOUD_ONLY, *MODES)

Progress = Callable[[str], None]
Load = Callable[[str, int], Sequence[Sample]]
Choices = tuple[list[int], list[int]]


def fits(bundle: Bundle, size: Size, max_positions: int = MAX_POSITIONS) -> Callable[[str], bool]:
    """Return whether a prompt and its longest answer fit the device's and `max_positions`."""
    longest = max(size.table_tokens, *(task.max_tokens or 0 for task in TASKS.values()))
    room = (
        min(max_positions, AgentConfig().max_positions, bundle.manifest.model.max_positions)
        - longest
    )
    tokenizer = ChatTokenizer(bundle)
    return lambda prompt: len(tokenizer.encode_chat([ChatMessage("user", prompt)])) <= room


def score(
    size: Size,
    bundle: Bundle,
    load: Load,
    scored: RowFile[Scored],
    run: str,
    progress: Progress,
    *,
    model: str = DEFAULT_MODEL,
) -> None:
    """Add to `scored` the missing answers to `size.scored_samples` samples of each task.

    `load` returns samples of a data set, by their number; `model` is the checkpoint that the bundle
    was made of.

    Raises:
        ConfigError: `model` is not of the bundle's shape, or `load` raises it.
        LinkError: the machine is so busy that a token takes a minute.
    """
    num_threads = max(1, (os.cpu_count() or 1) // 2)  # both sides share the machine
    with InProcessFleet(bundle, num_threads, max_requests=len(MODES)) as fleet:
        scorer = Scorer(
            bundle, model, num_threads=num_threads, fleet=fleet, run=run, progress=progress
        )
        for dataset in TASKS:
            samples = load(dataset, size.scored_samples)
            for number, sample in enumerate(samples, 1):
                lacking = [s for s in SYSTEMS if (s, dataset, sample.id) not in scored]
                if lacking:
                    progress(f"{dataset}: sample {number} of {len(samples)}")
                    for row in scorer.rows(dataset, sample, lacking, size.table_tokens):
                        scored.add(row)


class Scorer:
    """Answers samples and scores the answers."""

    def __init__(
        self,
        bundle: Bundle,
        model: str,
        num_threads: int,
        fleet: InProcessFleet,
        run: str,
        progress: Progress,
    ) -> None:
        self._manifest = bundle.manifest
        self._model_name = model
        self._fleet = fleet
        self._run = run
        self._progress = progress
        self._full = FullModel(bundle, num_threads)
        self._chat = ChatTokenizer(bundle)
        self._tokenizer: Any = Tokenizer.from_file(str(bundle.path("tokenizer/tokenizer.json")))

    def rows(
        self, dataset: str, sample: Sample, systems: Sequence[str], max_tokens: int
    ) -> list[Scored]:
        """Return one row for each of `systems`, of which there is at least one.

        The device answers for all at once.
        """
        task = TASKS[dataset]
        max_tokens = 1 if task.choices else task.max_tokens or max_tokens
        prompt_ids = self._chat.encode_chat([ChatMessage("user", sample.prompt)])
        cloud_systems = [s for s in systems if s in MODES and (s == VERIFIED or not task.choices)]
        requests = [
            msgspec.structs.replace(MODES[s], prompt=sample.prompt, max_new_tokens=max_tokens)
            for s in cloud_systems
        ]
        with ThreadPoolExecutor(len(MODES)) as pool:
            futures = {
                s: pool.submit(self._fleet.ask, request)
                for s, request in zip(cloud_systems, requests, strict=True)
            }
            answers = {}
            if CLOUD_ONLY in systems and not task.choices:
                answers[CLOUD_ONLY] = self._of_checkpoint(
                    prompt_ids, max_tokens
                )  # at the same time
            reading = self._full.read(prompt_ids, max_tokens)
            answers |= {system: future.result() for system, future in futures.items()}
        rows = []
        for system in systems:
            preference = None
            if task.choices:
                chosen, preference = self._choose(
                    self._choices(*task.choices), system, prompt_ids, reading
                )
                answers.setdefault(system, chosen)
            rows.append(
                self._row(
                    dataset,
                    sample,
                    system=system,
                    answer=answers[system],
                    reading=reading,
                    preference=preference,
                )
            )
        return rows

    def _of_checkpoint(self, prompt_ids: list[int], max_tokens: int) -> FleetAnswer:
        input_ids = torch.tensor([prompt_ids])
        with torch.inference_mode():
            whole = self._checkpoint.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=max_tokens,
                do_sample=False,
                eos_token_id=list(self._manifest.model.eos_token_ids),
            )
        return self._token_answer(whole[0, len(prompt_ids) :].tolist(), CLOUD)

    def _token_answer(self, token_ids: list[int], source: str) -> FleetAnswer:
        stream = self._chat.stream()  # as a device does it
        text = "".join([stream.push(token_id) for token_id in token_ids]) + stream.flush()
        return FleetAnswer(text, tuple(token_ids), {source: len(token_ids)})

    # Tasks decided by the first token.

    def _choose(
        self, choices: Choices, system: str, prompt_ids: list[int], reading: Reading
    ) -> tuple[FleetAnswer, float]:
        """Return the first token, and the choice that its source prefers."""
        logits = reading.logits
        if system == CLOUD_ONLY:
            with torch.inference_mode():
                logits = self._checkpoint(torch.tensor([prompt_ids]), logits_to_keep=1).logits[
                    0, -1
                ]
        elif (
            system != VERIFIED
            and (number := self._deciding_exit(MODES[system], reading.exits)) is not None
        ):
            candidates = reading.exits[number]
            source = exit_source(self._manifest.exits[number])
            answer = self._token_answer([int(candidates.token_ids[0])], source)
            return answer, exit_preference(candidates, choices)
        return self._token_answer([int(logits.argmax())], CLOUD), logits_preference(logits, choices)

    def _deciding_exit(self, request: PromptRequest, exits: Sequence[ExitCandidates]) -> int | None:
        """Return the first exit that is confident.

        Without one it is the deepest if the device is alone, else None, the cloud.
        """
        thresholds = (
            self._manifest.thresholds
            if request.threshold is None
            else (request.threshold,) * len(exits)
        )
        pairs = enumerate(zip(exits, thresholds, strict=True))
        sure = (
            number
            for number, (exit_, threshold) in pairs
            if exit_emits(exit_.confidence, threshold)
        )
        return next(sure, len(exits) - 1 if request.mode is Mode.STANDALONE else None)

    def _choices(self, first: str, second: str) -> Choices:
        """Return the first tokens of either word, with a capital or without."""
        return self._first_tokens(first), self._first_tokens(second)

    def _first_tokens(self, word: str) -> list[int]:
        return sorted(
            {
                self._tokenizer.encode(w, add_special_tokens=False).ids[0]
                for w in (word, word.lower())
            }
        )

    def _row(
        self,
        dataset: str,
        sample: Sample,
        system: str,
        answer: FleetAnswer,
        reading: Reading,
        preference: float | None = None,
    ) -> Scored:
        verdict = reading.judge(answer.token_ids)
        if system == VERIFIED and verdict.agreement < 1:
            kind = "a tie" if verdict.gap <= TIE else "NOT a tie"
            self._progress(
                f"{dataset}, sample {sample.id}: a verified token is not the full model's choice; "
                f"the logits lie {verdict.gap:.2g} apart, {kind}"
            )
        details = score_answer(dataset, answer.text, sample, preference)
        return Scored(
            system=system,
            dataset=dataset,
            sample=sample.id,
            run=self._run,
            text=answer.text,
            token_ids=answer.token_ids,
            tokens_from=answer.tokens_from,
            score=next(iter(details.values()), None),
            details=details,
            label=sample.label,
            preference=preference,
            nll=verdict.nll,
            agreement=verdict.agreement,
            gap=verdict.gap,
        )

    @cached_property
    def _checkpoint(self) -> Any:
        # Eager attention is slow on long prompts.
        model = whole_model(self._model_name, "sdpa", self._progress)
        check_shape(model.config, self._manifest, self._model_name)
        return model


def check_shape(config: Any, manifest: Manifest, name: str) -> None:
    """Raise ConfigError when a checkpoint cannot be the one that a bundle was made of."""
    got = config.num_hidden_layers, config.hidden_size, config.vocab_size
    expected = manifest.model.num_layers, manifest.model.hidden_size, manifest.model.vocab_size
    if got != expected:
        raise ConfigError(
            f"expected the checkpoint of {manifest.model.name} (layers, hidden size, vocabulary "
            f"{expected}), got {name} ({got}); name the model that the bundle was made of"
        )


def score_answer(
    dataset: str, text: str, sample: Sample, preference: float | None
) -> dict[str, float]:
    """Return the task's metrics of one answer by name, the main one first.

    There are none without a reference.
    """
    if preference is not None:
        return {"accuracy": float((preference > 0) == bool(sample.label))}
    if dataset == "quac":
        return {"f1": word_f1(text, sample.references)}
    if dataset == "xsum":
        overlap = rouge(text, sample.references[0])
        return {"rougeL": overlap.rouge_l, "rouge1": overlap.rouge1, "rouge2": overlap.rouge2}
    return {}


def logits_preference(logits: Tensor, choices: Choices) -> float:
    """Return log P(first) - log P(second) of logits [vocab].

    A choice has the probability of its tokens together.
    """
    first, second = (float(logits[ids].logsumexp(0)) for ids in choices)
    return first - second


def exit_preference(candidates: ExitCandidates, choices: Choices) -> float:
    """Return the same by an exit's candidates.

    A choice that is not among them counts as the least of them.
    """
    logprobs = dict(zip(candidates.token_ids.tolist(), candidates.logprobs.tolist(), strict=True))
    least = float(candidates.logprobs.min())
    first, second = (
        float(torch.tensor([logprobs[i] for i in ids if i in logprobs] or [least]).logsumexp(0))
        for ids in choices
    )
    return first - second
