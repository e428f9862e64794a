"""From prompts to a file of exit heads: what `fleet heads train` does."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from filelock import FileLock, Timeout
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fleet.errors import ConfigError
from fleet.exits.records import Records
from fleet.utils.prompt_file import read_prompts
from onnx_export.architecture import check_exits, check_model
from onnx_export.checkpoint import load_pretrained, resolve_model
from onnx_export.config import DEFAULT_MODEL
from onnx_export.heads import ExitHead, HeadKind, HeadsFile, fingerprint, new_head, save_heads
from onnx_export.training.corpus import Corpus, CorpusConfig, Makers, load_answers
from onnx_export.training.fitting import FitConfig, fit, fit_ridge, judge
from onnx_export.training.generation import Answers, concatenate
from onnx_export.training.prompts import draw_many

HELD_OUT: Final = 20  # every n-th conversation is not trained on
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training: heads of one kind for `exits` of a model, from `tokens` tokens of its own answers.

    `prompts`: files of prompts beside those that the model draws itself; may be empty. `cache`: where the answers are
    kept. `intermediate`: width of an ``mlp`` head, or 0 for the hidden size. `batch`: conversations that a process
    generates at once; it decides the memory. `processes`: that generate on a CPU.
    """

    exits: tuple[int, ...]
    out: Path
    cache: Path
    model: str = DEFAULT_MODEL
    prompts: tuple[Path, ...] = ()
    kind: HeadKind = "linear"
    intermediate: int = 0
    tokens: int = 500_000
    epochs: float = 3.0
    max_prompt_tokens: int = 128
    max_new_tokens: int = 128
    batch: int = 192
    processes: int = 1
    seed: int = 0


def train_heads(config: TrainConfig, progress: Progress = lambda *_: None) -> Records:
    """Writes ``config.out`` and records what the heads say along held-out conversations.

    `progress` hears stage, done and total. Interrupted, it goes on from the shards that were finished.

    Raises:
        ConfigError: a value that makes no sense, or prompts that cannot be read.
        ExportError: the model cannot be exported, or the exits do not fit it.
    """
    for name, least in {
        "tokens": 1,
        "epochs": 0,
        "max_new_tokens": 2,
        "batch": 1,
        "processes": 1,
    }.items():
        if getattr(config, name) < least:
            raise ConfigError(
                f"{name.replace('_', '-')} {getattr(config, name)}: expected at least {least}"
            )
    given = [prompt for path in config.prompts for prompt in read_prompts(path)]
    source = resolve_model(config.model, lambda line: progress(line, 0, 1))
    model = load_model(source, config.model)
    check_exits(config.exits, model.config.num_hidden_layers)
    heads = {
        layer: new_head(config.kind, model, layer, config.intermediate) for layer in config.exits
    }
    answers = generate(config, source, model, given, progress)
    chosen = torch.arange(len(answers))
    held_out = chosen % HELD_OUT == 0
    fit_heads(
        heads,
        model,
        answers=answers,
        conversations=chosen[~held_out],
        config=config,
        progress=progress,
    )
    records = hear(heads, model, answers, chosen[held_out])
    made_by = describe(config, len(answers.final), records)
    save_heads(HeadsFile(heads, config.kind, fingerprint(model), made_by), config.out)
    return records


def hear(
    heads: Mapping[int, ExitHead], model: Any, answers: Answers, conversations: Tensor
) -> Records:
    """What each head says at the answering positions of some conversations."""
    said = [
        judge(head, layer, model, answers, conversations) for layer, head in sorted(heads.items())
    ]
    counts = (answers.lengths - answers.prompt_lengths + 1)[conversations]
    confidence, agrees = (torch.stack(columns, 1).numpy() for columns in zip(*said, strict=True))
    answer = torch.repeat_interleave(conversations, counts).numpy()
    return Records(tuple(sorted(heads)), answer, confidence.astype("float64").clip(0, 1), agrees)


def draw(
    name: str, count: int, seed: int, batch: int, progress: Callable[[int], None] = lambda _: None
) -> list[str]:
    """Different prompts that a model puts into an empty user turn; `progress` hears how many there are.

    Raises:
        ExportError: the model cannot be exported, or puts no prompts there.
    """
    source = resolve_model(name)
    model = load_model(source, name)
    tokenizer = load_pretrained(AutoTokenizer, source, name)
    return draw_many(model, tokenizer, count=count, seed=seed, batch=batch, progress=progress)


def load_model(source: str, name: str) -> Any:
    """A model that can be exported, in float32, frozen.

    Raises:
        ExportError: it cannot be loaded or exported.
    """
    check_model(load_pretrained(AutoConfig, source, name))
    return (
        load_pretrained(AutoModelForCausalLM, source, name, dtype=torch.float32)
        .eval()
        .requires_grad_(False)
    )


def generate(
    config: TrainConfig, source: str, model: Any, given: list[str], progress: Progress
) -> Answers:
    """The model's answers, made now or found in the cache."""
    corpus_config = CorpusConfig(
        source=source,
        layers=tuple(sorted(config.exits)),
        seed=config.seed,
        max_prompt_tokens=config.max_prompt_tokens,
        max_new_tokens=config.max_new_tokens,
        batch=config.batch,
    )
    corpus = Corpus(config.cache, corpus_config, given, fingerprint(model))
    try:
        with (
            FileLock(corpus.folder / ".lock", timeout=0),
            Makers(corpus_config, config.processes) as makers,
        ):
            shards = corpus.fill(
                config.tokens, makers, lambda done: progress("answering", done, config.tokens)
            )
    except Timeout:
        raise ConfigError(
            f"another training is filling {corpus.folder}; wait for it, or give another --seed"
        ) from None
    return concatenate([load_answers(path, config.exits) for path in shards])


def fit_heads(
    heads: Mapping[int, ExitHead],
    model: Any,
    answers: Answers,
    conversations: Tensor,
    config: TrainConfig,
    progress: Progress,
) -> None:
    """In closed form where there is one, then by gradient."""
    if config.kind == "shared":
        return
    spans = [answers.answering(conversation) for conversation in conversations.tolist()]
    if config.kind != "block":
        rows, targets = (
            torch.cat([torch.arange(s.start, s.stop) for s in side])
            for side in zip(*spans, strict=True)
        )
        for layer, head in heads.items():
            fit_ridge(head, answers.hidden[layer][rows], answers.final[targets])
    fit_config = FitConfig(epochs=config.epochs, seed=config.seed)
    total = max(1, round(config.epochs * len(conversations)))
    done = 0

    def tick(count: int) -> None:
        nonlocal done
        done += count
        progress("fitting", min(done, total), total)

    if config.epochs:
        fit(
            heads, model, answers=answers, conversations=conversations, config=fit_config, tick=tick
        )


def describe(config: TrainConfig, num_tokens: int, records: Records) -> dict[str, str]:
    """How the heads were made, for their file: options by name, the prompts by hash, and the held-out agreement."""
    options = {
        key: str(value)
        for key, value in asdict(config).items()
        if key not in ("out", "cache", "processes")
    }
    prompts = {
        f"sha256 of {path.name}": hashlib.sha256(path.read_bytes()).hexdigest()
        for path in config.prompts
    }
    agreement = {
        f"held-out agreement at {layer}": f"{share:.4f}"
        for layer, share in records.agreement().items()
    }
    options |= {
        "prompts": " ".join(path.name for path in config.prompts),
        "tokens": str(num_tokens),
    }
    return options | prompts | agreement
