"""The training text on disk: shards of conversations that several processes make once."""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Literal, TypeVar

import msgspec
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fleet.bundles.instruction_sets import machine_flags
from fleet.errors import ConfigError, ExportError
from onnx_export.architecture import eos_token_ids
from onnx_export.checkpoint import load_tokenizer
from onnx_export.streamed_model import load_whole_model
from onnx_export.training.config import ANSWER_SHARE
from onnx_export.training.generation import (
    TENSORS,
    TOP_K,
    TrainingAnswers,
    concatenate,
    generate_answers,
)
from onnx_export.training.prompts import ChatFormat, check_yield, generate_prompts, without_repeats

TEMPERATURES: Final = (0.0, 0.0, 0.7)
"""Temperatures of successive shards: mostly the greedy answers of devices, and some variety."""
FORMAT: Final = 2
MATRIX_UNIT: Final = "amx_bf16"
PromptT = TypeVar("PromptT")
Source = Literal["files", "drawn", "prompts"]
"""The shards' kinds: answers to prompts from files, answers to drawn prompts, drawn prompts."""


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """Inputs of the text; the same values give the same shards on the same machine.

    `source`: a checkpoint's folder or hub name. `batch` conversations make a shard. The hidden
    states of `layers` are stored and do not change the text: a shard that lacks a layer is made
    again with it.
    """

    source: str
    layers: tuple[int, ...]
    seed: int
    max_prompt_tokens: int
    max_new_tokens: int
    batch: int


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """One shard to make: prompts to answer, or, without any, prompts to draw."""

    path: Path
    seed: int
    temperature: float = 0.0
    prompts: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()

    @property
    def is_done(self) -> bool:
        """Whether the shard is there, with all layers."""
        return self.path.exists() and set(self.layers) <= stored_layers(self.path)


class ShardMaker:
    """A loaded model that makes shards, `rows` conversations at once."""

    def __init__(self, config: CorpusConfig, rows: int) -> None:
        self.config = config
        self.rows = rows
        model = load_whole_model(config.source, config.source, generation_dtype())
        self.model = model.to("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = load_tokenizer(config.source, config.source)
        self.chat = ChatFormat.of(self.tokenizer)
        self.ends = eos_token_ids(config.source, model, self.tokenizer)

    def make(self, task: ShardTask) -> None:
        """Write the shard of `task`, whole or not at all."""
        generator = torch.Generator().manual_seed(task.seed)
        if task.prompts:
            answers = self._answer(task, generator)
            write_whole(task.path, lambda path: save_answers(answers, path))
        else:
            prompts: list[str] = []
            for rows in batches(range(2 * self.config.batch), self.rows):
                prompts += generate_prompts(
                    self.model, self.tokenizer, self.chat, len(rows), generator
                )
            content = msgspec.json.encode(prompts)
            write_whole(task.path, lambda path: path.write_bytes(content))

    def _answer(self, task: ShardTask, generator: torch.Generator) -> TrainingAnswers:
        ids = self.tokenizer(list(task.prompts), add_special_tokens=False)["input_ids"]
        before = list(self.chat.before)
        after = list(self.chat.after)
        rows = [before + prompt_ids + after for prompt_ids in ids]
        answers = [
            generate_answers(
                self.model,
                some,
                layers=task.layers,
                ends=self.ends,
                max_new_tokens=self.config.max_new_tokens,
                temperature=task.temperature,
                generator=generator,
            )
            for some in batches(rows, self.rows)
        ]
        return concatenate(answers)


def generation_dtype() -> torch.dtype:
    """Return bfloat16 for CUDA and for processors with a matrix unit for it, else float32."""
    is_fast = torch.cuda.is_available() or MATRIX_UNIT in machine_flags()
    return torch.bfloat16 if is_fast else torch.float32


class Corpus:
    """The shards of one configuration, which grow with the number of tokens requested.

    Shards of answers are numbered. Of three, two answer prompts drawn from the model and one
    answers prompts from files, while there are any; so a shard does not depend on the number of
    tokens requested. Answers to drawn prompts are in a folder of their own, `folder`: runs with
    other files use them, too.
    """

    def __init__(
        self, folder: Path, config: CorpusConfig, file_prompts: Sequence[str], fingerprint: str
    ) -> None:
        """Create the folders of this configuration's shards below `folder`.

        `file_prompts` are the prompts from files; `fingerprint` is the model's.
        """
        self.config = config
        self.folder = folder / corpus_key(config, (), fingerprint)
        self._files_folder = folder / corpus_key(config, file_prompts, fingerprint)
        for each in (self.folder, self._files_folder):
            each.mkdir(parents=True, exist_ok=True)
        short = self._short(without_repeats(file_prompts))
        self._file_batches = batches(short, config.batch)
        self._drawn_batches: list[tuple[str, ...]] = []
        self._num_drawn = 0

    def _short(self, prompts: list[str]) -> list[str]:
        """Return the prompts that are not too long, in random order."""
        if not prompts:
            return []
        tokenizer = load_tokenizer(self.config.source, self.config.source)
        ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
        generator = torch.Generator().manual_seed(self.config.seed)
        order = torch.randperm(len(prompts), generator=generator).tolist()
        return [prompts[i] for i in order if len(ids[i]) <= self.config.max_prompt_tokens]

    def fill(
        self, num_tokens: int, makers: ShardMakerPool, progress: Callable[[int], None]
    ) -> list[Path]:
        """Make the missing shards.

        Return the first shards that together hold at least `num_tokens` tokens of answers.
        `progress` receives the number of tokens so far.
        """
        paths: list[Path] = []
        total = 0
        progress(0)
        while total < num_tokens:
            num_shards = self._num_shards(num_tokens - total, total, len(paths))
            numbers = range(len(paths), len(paths) + min(num_shards, makers.processes))
            tasks = self._answer_tasks(numbers, makers)
            makers.make(tasks)
            for task in tasks:
                if total < num_tokens:
                    paths.append(task.path)
                    total += count_tokens(task.path)
            progress(total)
        return paths

    def _num_shards(self, num_tokens: int, total: int, num_made: int) -> int:
        """Estimate the number of shards with `num_tokens` tokens, from `num_made` with `total`."""
        config = self.config
        expected = ANSWER_SHARE * config.max_new_tokens * config.batch
        mean = total / num_made if num_made else expected
        return math.ceil(num_tokens / mean)

    def _answer_tasks(self, numbers: range, makers: ShardMakerPool) -> list[ShardTask]:
        """Return the tasks of some shards of answers; draw prompts for them as needed."""
        num_needed = sum(not self._is_from_files(number) for number in range(numbers.stop))
        while len(self._drawn_batches) < num_needed:
            self._draw(makers, num_needed - len(self._drawn_batches))
        return [self._answer_task(number) for number in numbers]

    def _is_from_files(self, number: int) -> bool:
        return number % 3 == 2 and number // 3 < len(self._file_batches)

    def _answer_task(self, number: int) -> ShardTask:
        """Return the task of one shard of answers."""
        if self._is_from_files(number):
            index = number // 3
            return self._task(self._files_folder, index, "files", self._file_batches[index])
        index = number - min((number + 1) // 3, len(self._file_batches))
        return self._task(self.folder, index, "drawn", self._drawn_batches[index])

    def _task(
        self, folder: Path, index: int, source: Source, prompts: tuple[str, ...]
    ) -> ShardTask:
        """Return the task that answers `prompts`, the `index`-th of their source."""
        path = folder / f"answers-{index:05}.safetensors"
        period = index if source == "files" else index // 2
        return ShardTask(
            path=path,
            seed=shard_seed(self.config.seed, index, source),
            temperature=TEMPERATURES[period % len(TEMPERATURES)],
            prompts=prompts,
            layers=tuple(sorted({*self.config.layers, *stored_layers(path)})),
        )

    def _draw(self, makers: ShardMakerPool, num_batches: int) -> None:
        """Draw prompts for up to `num_batches` more batches, or read those drawn before."""
        count = self._num_drawn + min(num_batches, makers.processes)
        tasks = [self._draw_task(number) for number in range(count)]
        makers.make(tasks[self._num_drawn :])
        self._num_drawn = count
        drawn: list[str] = []
        for task in tasks:
            drawn += msgspec.json.decode(task.path.read_bytes(), type=list[str])
        distinct = without_repeats(drawn)
        size = self.config.batch
        num_whole = len(distinct) // size
        self._drawn_batches = batches(distinct[: num_whole * size], size)
        check_yield(2 * count * size, len(distinct))

    def _draw_task(self, number: int) -> ShardTask:
        return ShardTask(
            path=self.folder / f"drawn-{number:05}.json",
            seed=shard_seed(self.config.seed, number, "prompts"),
        )


def corpus_key(config: CorpusConfig, file_prompts: Sequence[str], fingerprint: str) -> str:
    """Return the hash of everything that decides a corpus' text."""
    inputs = asdict(config)
    del inputs["source"], inputs["layers"]
    inputs |= {"given": list(file_prompts), "fingerprint": fingerprint, "format": FORMAT}
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


def batches(prompts: Sequence[PromptT], size: int) -> list[tuple[PromptT, ...]]:
    """Return the prompts in tuples of `size`; the last one may be shorter."""
    return [tuple(prompts[i : i + size]) for i in range(0, len(prompts), size)]


def shard_seed(seed: int, index: int, source: Source) -> int:
    """Return a separate seed for each shard."""
    digest = hashlib.sha256(f"{seed} {index} {source}".encode()).digest()
    return int.from_bytes(digest[:6])


_maker: ShardMaker  # in a process of the pool, once it has started


def start_maker(config: CorpusConfig, rows: int) -> None:
    """Load the model in a process of the pool, with one thread; it ends with its parent."""
    global _maker
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _maker = ShardMaker(config, rows)


def end_with_parent() -> None:
    """Wait for the parent process to end for any reason, then end this one."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def run_task(task: ShardTask) -> None:
    """Make a shard in a process of the pool."""
    _maker.make(task)


class ShardMakerPool:
    """Processes that make shards; a single one, as on CUDA, is this process.

    Each has one thread, which uses the cores better than one process with many threads.
    """

    def __init__(
        self,
        config: CorpusConfig,
        processes: int,
        rows: int,
        on_start: Callable[[], None] = lambda: None,
    ) -> None:
        """Each process generates `rows` at once; `on_start` is called before the first shard."""
        self._config = config
        self._rows = rows
        self._on_start = on_start
        self.processes = 1 if torch.cuda.is_available() else processes
        self._pool: ProcessPoolExecutor | None = None
        self._maker: ShardMaker | None = None

    def __enter__(self) -> ShardMakerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self._maker = None
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def make(self, tasks: Sequence[ShardTask]) -> None:
        """Make the shards that are missing."""
        missing = [task for task in tasks if not task.is_done]
        if not missing:
            return
        if self._maker is None and self._pool is None:
            self._on_start()
        if self.processes == 1:
            self._make_here(missing)
            return
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            arguments = (self._config, self._rows)
            self._pool = ProcessPoolExecutor(self.processes, context, start_maker, arguments)
        try:
            for future in [self._pool.submit(run_task, task) for task in missing]:
                future.result()
        except BrokenProcessPool:
            raise ExportError(
                "a process that generates answers was ended, for lack of memory perhaps; give a "
                "smaller --memory or --batch: the answers so far are kept"
            ) from None

    def _make_here(self, tasks: Sequence[ShardTask]) -> None:
        """Make shards in this process, with one thread as in a process of the pool."""
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            self._maker = self._maker or ShardMaker(self._config, self._rows)
            for task in tasks:
                self._maker.make(task)
        finally:
            torch.set_num_threads(num_threads)


def stored_layers(path: Path) -> set[int]:
    """Return the layers whose hidden states a shard holds: none for prompts or no file."""
    if not path.exists() or path.suffix != ".safetensors":
        return set()
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
    return {int(name.removeprefix("hidden.")) for name in names if name.startswith("hidden.")}


def count_tokens(path: Path) -> int:
    """Return the number of answering positions in a shard."""
    with safe_open(path, framework="pt") as file:
        count: int = file.get_slice("final").get_shape()[0]
    return count


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file through `write`; it gets its name when it is complete."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        write(partial)
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def save_answers(answers: TrainingAnswers, path: Path) -> None:
    """Write a shard of answers."""
    tensors = {f"hidden.{layer}": states for layer, states in answers.hidden.items()}
    for name in TENSORS:
        tensors[name] = getattr(answers, name)
    save_file(tensors, path)


def load_answers(path: Path, layers: Sequence[int]) -> TrainingAnswers:
    """Read a shard of answers with the hidden states of `layers` only.

    Raises:
        ConfigError: the shard lacks one of the layers or was made with another width.
    """
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        missing = [layer for layer in layers if f"hidden.{layer}" not in names]
        if missing:
            raise ConfigError(
                f"{path} has no hidden states of layers {missing}; "
                "remove the folder and make it again"
            )
        hidden = {layer: file.get_tensor(f"hidden.{layer}") for layer in layers}
        others = {name: file.get_tensor(name) for name in TENSORS}
    answers = TrainingAnswers(hidden=hidden, **others)
    if answers.top_ids.shape[1] != TOP_K:
        raise ConfigError(f"{path} was made by another version; remove it")
    return answers
