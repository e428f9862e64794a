"""The training text on disk: shards of conversations, each made once, by several processes, and found again."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import msgspec
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fleet.errors import ConfigError
from onnx_export.checkpoint import load_pretrained
from onnx_export.training.generation import TENSORS, TOP_K, Answers, answer
from onnx_export.training.prompts import ChatFormat, check_yield, draw_prompts, without_repeats

TEMPERATURES: Final = (
    0.0,
    0.0,
    0.7,
)  # shards take turns: mostly what devices will say, some variety
FORMAT: Final = 1


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """What the text is made of; the same values give the same shards on the same machine.

    `source`: a checkpoint's folder or hub name. `batch` conversations make a shard. `layers`, whose hidden states are
    kept, have no part in what is said: a shard that lacks one is made again with it.
    """

    source: str
    layers: tuple[int, ...]
    seed: int = 0
    max_prompt_tokens: int = 128
    max_new_tokens: int = 128
    batch: int = 192


@dataclass(frozen=True, kw_only=True)
class Task:
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


class Maker:
    """A loaded model that makes shards."""

    def __init__(self, config: CorpusConfig) -> None:
        self.config = config
        cuda = torch.cuda.is_available()
        dtype = torch.bfloat16 if cuda else torch.float32
        model = load_pretrained(AutoModelForCausalLM, config.source, config.source, dtype=dtype)
        self.model = model.to("cuda" if cuda else "cpu").eval().requires_grad_(False)
        self.tokenizer = load_pretrained(AutoTokenizer, config.source, config.source)
        self.chat = ChatFormat.of(self.tokenizer)
        ends = model.generation_config.eos_token_id
        self.ends = [ends] if isinstance(ends, int) else list(ends)

    def make(self, task: Task) -> None:
        """Writes the shard of `task`, whole or not at all."""
        generator = torch.Generator().manual_seed(task.seed)
        if not task.prompts:
            drawn = draw_prompts(
                self.model, self.tokenizer, self.chat, 2 * self.config.batch, generator
            )
            write_whole(task.path, lambda path: path.write_bytes(msgspec.json.encode(drawn)))
            return
        before = list(self.chat.before)
        after = list(self.chat.after)
        words = self.tokenizer(list(task.prompts), add_special_tokens=False)["input_ids"]
        answers = answer(
            self.model,
            [before + ids + after for ids in words],
            task.layers,
            self.ends,
            self.config.max_new_tokens,
            task.temperature,
            generator,
        )
        write_whole(task.path, lambda path: save_answers(answers, path))


class Corpus:
    """A folder of shards for one configuration, which grows as more text is asked for.

    Shards of answers are numbered. Of three, two answer prompts drawn from the model and one given prompts, as long as
    there are some; so a shard is the same however much is asked for.
    """

    def __init__(
        self, folder: Path, config: CorpusConfig, given: Sequence[str], fingerprint: str
    ) -> None:
        """The shards are in a subfolder of `folder`; `given`: prompts from files; `fingerprint`: the model's."""
        self.config = config
        made_of = asdict(config) | {
            "given": list(given),
            "fingerprint": fingerprint,
            "format": FORMAT,
        }
        del made_of["source"], made_of["layers"]
        key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = folder / key
        self.folder.mkdir(parents=True, exist_ok=True)
        short = self._short(without_repeats(given))
        self._given = [
            tuple(short[i : i + config.batch]) for i in range(0, len(short), config.batch)
        ]
        self._own: list[tuple[str, ...]] = []
        self._num_drawn = 0

    def _short(self, prompts: list[str]) -> list[str]:
        """In random order, those that are not too long."""
        if not prompts:
            return []
        tokenizer = load_pretrained(AutoTokenizer, self.config.source, self.config.source)
        ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
        order = torch.randperm(
            len(prompts), generator=torch.Generator().manual_seed(self.config.seed)
        ).tolist()
        return [prompts[i] for i in order if len(ids[i]) <= self.config.max_prompt_tokens]

    def fill(self, num_tokens: int, makers: Makers, progress: Callable[[int], None]) -> list[Path]:
        """Makes what is missing; the shards, in order, that hold `num_tokens` tokens of answers or just more.

        `progress` hears how many tokens there are.
        """
        paths: list[Path] = []
        total = 0
        while total < num_tokens:
            numbers = range(len(paths), len(paths) + makers.processes)
            while len(self._own) < sum(
                not self._is_given(number) for number in range(numbers.stop)
            ):
                self._draw(makers)
            tasks = [self._answering(number) for number in numbers]
            makers.make(tasks)
            for task in tasks:
                if total < num_tokens:
                    paths.append(task.path)
                    total += count_tokens(task.path)
            progress(total)
        return paths

    def _is_given(self, number: int) -> bool:
        return number % 3 == 2 and number // 3 < len(self._given)

    def _answering(self, number: int) -> Task:
        """The task of one shard of answers."""
        given = self._is_given(number)
        prompts = (
            self._given[number // 3]
            if given
            else self._own[number - min((number + 1) // 3, len(self._given))]
        )
        temperature = TEMPERATURES[number // 3 % len(TEMPERATURES)]
        path = self.folder / f"answers-{number:05}.safetensors"
        layers = tuple(sorted({*self.config.layers, *stored_layers(path)}))
        return Task(
            path=path,
            seed=shard_seed(self.config.seed, number),
            temperature=temperature,
            prompts=prompts,
            layers=layers,
        )

    def _draw(self, makers: Makers) -> None:
        """Draws more prompts, or reads those that were drawn."""
        count = self._num_drawn + makers.processes
        tasks = [
            Task(
                path=self.folder / f"drawn-{number:05}.json",
                seed=shard_seed(self.config.seed, number, drawing=True),
            )
            for number in range(count)
        ]
        makers.make(tasks[self._num_drawn :])
        self._num_drawn = count
        drawn = [
            text
            for task in tasks
            for text in msgspec.json.decode(task.path.read_bytes(), type=list[str])
        ]
        distinct = without_repeats(drawn)
        batch = self.config.batch
        self._own = [
            tuple(distinct[i : i + batch]) for i in range(0, len(distinct) - batch + 1, batch)
        ]
        check_yield(2 * count * batch, len(distinct))


def shard_seed(seed: int, number: int, drawing: bool = False) -> int:
    """A seed of its own for each shard."""
    digest = hashlib.sha256(f"{seed} {number} {drawing}".encode()).digest()
    return int.from_bytes(digest[:6])


_maker: Maker  # in a process of the pool, once it has started


def start_maker(config: CorpusConfig) -> None:
    """In a process of its own: loads the model, with one thread; ends when the process that asks for it does."""
    global _maker
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _maker = Maker(config)


def end_with_parent() -> None:
    """Waits for the parent process to end, however it does, and ends this one."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def run_task(task: Task) -> None:
    """In such a process."""
    _maker.make(task)


class Makers:
    """Processes that make shards, one thread each, which share the cores better than one with many; on CUDA, one."""

    def __init__(self, config: CorpusConfig, processes: int) -> None:
        self._config = config
        self.processes = 1 if torch.cuda.is_available() else processes
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Makers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def make(self, tasks: Sequence[Task]) -> None:
        """Makes the shards that are missing."""
        missing = [task for task in tasks if not task.is_done]
        if not missing:
            return
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.processes, context, start_maker, (self._config,))
        for future in [self._pool.submit(run_task, task) for task in missing]:
            future.result()


def stored_layers(path: Path) -> set[int]:
    """Layers whose hidden states a shard holds; none for prompts, or when there is no such file."""
    if not path.exists() or path.suffix != ".safetensors":
        return set()
    with safe_open(path, framework="pt") as file:
        return {
            int(key.removeprefix("hidden.")) for key in file.keys() if key.startswith("hidden.")
        }  # noqa: SIM118


def count_tokens(path: Path) -> int:
    """Answering positions in a shard."""
    with safe_open(path, framework="pt") as file:
        count: int = file.get_slice("final").get_shape()[0]
    return count


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a file that gets its name when it is complete."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        write(partial)
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def save_answers(answers: Answers, path: Path) -> None:
    """Writes a shard."""
    tensors = {f"hidden.{layer}": states for layer, states in answers.hidden.items()}
    tensors |= {name: getattr(answers, name) for name in TENSORS}
    save_file(tensors, path)


def load_answers(path: Path, layers: Sequence[int]) -> Answers:
    """Reads a shard, with the hidden states of `layers` alone.

    Raises:
        ConfigError: the shard has no such layer or was made with another width.
    """
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        missing = [layer for layer in layers if f"hidden.{layer}" not in names]
        if missing:
            raise ConfigError(
                f"{path} has no hidden states of layers {missing}; remove the folder and make it again"
            )
        answers = Answers(
            hidden={layer: file.get_tensor(f"hidden.{layer}") for layer in layers},
            **{name: file.get_tensor(name) for name in TENSORS},
        )
    if answers.top_ids.shape[1] != TOP_K:
        raise ConfigError(f"{path} was made by another version; remove it")
    return answers
