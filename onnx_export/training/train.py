"""Training from prompts to a file of exit heads, for `fleet heads train`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, Final

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from fleet.errors import ConfigError
from fleet.exits.records import Records
from fleet.utils.prompt_file import read_prompts
from onnx_export.architecture import check_exits, check_model
from onnx_export.checkpoint import load_config, load_tokenizer, resolve_model
from onnx_export.heads import (
    ExitHead,
    HeadsFile,
    model_fingerprint,
    new_head,
    save_heads,
)
from onnx_export.streamed_model import load_whole_model
from onnx_export.training.config import TrainConfig
from onnx_export.training.corpus import Corpus, CorpusConfig, ShardMakerPool, load_answers
from onnx_export.training.fitting import FitConfig, evaluate_head, fit_by_gradient, fit_ridge
from onnx_export.training.generation import TrainingAnswers, concatenate
from onnx_export.training.memory import loaded_bytes, plan_generation
from onnx_export.training.prompts import MAX_DRAWN_TOKENS, draw_many
from onnx_export.variants import state_scale

HELD_OUT: Final = 20  # every n-th conversation is not trained on
Progress = Callable[[str, int, int], None]


def train_heads(config: TrainConfig, progress: Progress = lambda *_: None) -> Records:
    """Write ``config.out`` and return records of the heads along held-out conversations.

    `progress` receives stage, done and total; with a total of 0 the stage is a message. An
    interrupted training continues from the shards that were finished.

    Raises:
        ConfigError: an option is invalid, or prompts cannot be read.
        ExportError: the model cannot be exported, or the exits do not fit it.
    """
    config.check()
    file_prompts = [prompt for path in config.prompts for prompt in read_prompts(path)]
    source = resolve_model(config.model, lambda line: progress(line, 0, 0))
    model = load_frozen_model(source, config.model)
    check_exits(config.exits, model.config.num_hidden_layers - 1)
    heads = {
        layer: new_head(config.kind, model, layer, config.intermediate) for layer in config.exits
    }
    answers = collect_answers(config, source, model, file_prompts, progress)
    conversations = torch.arange(len(answers))
    is_held_out = conversations % HELD_OUT == 0
    fit_heads(
        heads,
        model,
        answers=answers,
        conversations=conversations[~is_held_out],
        config=config,
        progress=progress,
    )
    records = record_heads(heads, model, answers, conversations[is_held_out])
    made_by = describe_training(config, len(answers.final), records)
    save_heads(HeadsFile(heads, config.kind, model_fingerprint(model), made_by), config.out)
    return records


def record_heads(
    heads: Mapping[int, ExitHead], model: Any, answers: TrainingAnswers, conversations: Tensor
) -> Records:
    """Record each head at the answering positions of some conversations."""
    confidence: list[Tensor] = []
    agrees: list[Tensor] = []
    for layer, head in sorted(heads.items()):
        confident, equal = evaluate_head(head, layer, model, answers, conversations)
        confidence.append(confident)
        agrees.append(equal)
    counts = (answers.lengths - answers.prompt_lengths + 1)[conversations]
    columns = torch.stack(confidence, 1).numpy()
    return Records(
        tuple(sorted(heads)),
        torch.repeat_interleave(conversations, counts).numpy(),
        columns.astype("float64").clip(0, 1),
        torch.stack(agrees, 1).numpy(),
    )


def draw_training_prompts(
    name: str,
    count: int,
    seed: int,
    batch: int,
    memory: int | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> list[str]:
    """Return different prompts that a model puts into an empty user turn.

    `batch` are drawn at once, or fewer where `memory` bytes need it. `progress` receives the number
    so far.

    Raises:
        ConfigError: the memory is not enough for one.
        ExportError: the model cannot be exported, or puts no prompts there.
    """
    source = resolve_model(name)
    model = load_frozen_model(source, name)
    tokenizer = load_tokenizer(source, name)
    config = CorpusConfig(
        source=source,
        layers=(),
        seed=seed,
        max_prompt_tokens=0,
        max_new_tokens=MAX_DRAWN_TOKENS,
        batch=batch,
    )
    plan = plan_generation(model.config, model.num_parameters(), config, processes=1, memory=memory)
    return draw_many(model, tokenizer, count=count, seed=seed, batch=plan.rows, progress=progress)


def load_frozen_model(source: str, name: str) -> Any:
    """Return a model that can be exported, in float32, frozen.

    Raises:
        ExportError: it cannot be loaded or exported.
    """
    check_model(load_config(source, name))
    return load_whole_model(source, name)


def collect_answers(
    config: TrainConfig, source: str, model: Any, file_prompts: list[str], progress: Progress
) -> TrainingAnswers:
    """Return the model's answers, from the cache or made now."""
    corpus_config = CorpusConfig(
        source=source,
        layers=tuple(sorted(config.exits)),
        seed=config.seed,
        max_prompt_tokens=config.max_prompt_tokens,
        max_new_tokens=config.max_new_tokens,
        batch=config.shard_size,
    )
    corpus = Corpus(config.cache, corpus_config, file_prompts, model_fingerprint(model))

    def report(done: int) -> None:
        progress("answering", done, config.tokens)

    plan = plan_generation(
        model.config,
        model.num_parameters(),
        corpus_config,
        processes=config.processes,
        memory=config.memory,
        own_bytes=loaded_bytes(model.num_parameters()),
    )
    try:
        with (
            FileLock(corpus.folder / ".lock", timeout=0),
            ShardMakerPool(
                corpus_config, plan.processes, plan.rows, lambda: progress(plan.line, 0, 0)
            ) as makers,
        ):
            shards = corpus.fill(config.tokens, makers, report)
    except Timeout:
        raise ConfigError(
            f"another training is filling {corpus.folder}; wait for it, or give another --seed"
        ) from None
    return concatenate([load_answers(path, config.exits) for path in shards])


def fit_heads(
    heads: Mapping[int, ExitHead],
    model: Any,
    *,
    answers: TrainingAnswers,
    conversations: Tensor,
    config: TrainConfig,
    progress: Progress,
) -> None:
    """Fit heads in closed form where there is one, then by gradient."""
    if config.kind == "shared":
        return
    if config.kind != "block":
        fit_closed_form(heads, answers, conversations, state_scale(model.config))
    total = max(1, round(config.epochs * len(conversations)))
    done = 0

    def tick(count: int) -> None:
        nonlocal done
        done += count
        progress("fitting", min(done, total), total)

    if config.epochs:
        fit_by_gradient(
            heads,
            model,
            answers=answers,
            conversations=conversations,
            config=FitConfig(epochs=config.epochs, seed=config.seed),
            tick=tick,
        )


def fit_closed_form(
    heads: Mapping[int, ExitHead], answers: TrainingAnswers, conversations: Tensor, scale: float
) -> None:
    """Fit the heads' matrices by ridge regression on some conversations.

    `scale` is that of the answers' hidden states.
    """
    rows: list[Tensor] = []
    targets: list[Tensor] = []
    for conversation in conversations.tolist():
        positions, answering = answers.answering(conversation)
        rows.append(torch.arange(positions.start, positions.stop))
        targets.append(torch.arange(answering.start, answering.stop))
    final = answers.final[torch.cat(targets)]
    for layer, head in heads.items():
        fit_ridge(head, answers.hidden[layer][torch.cat(rows)], final, scale)


def describe_training(config: TrainConfig, num_tokens: int, records: Records) -> dict[str, str]:
    """Describe how the heads were made, for their file.

    The description has the options by name, the prompts by hash, and the held-out agreement.
    """
    description = {key: str(value) for key, value in asdict(config).items()}
    for key in ("out", "cache", "processes", "memory"):
        del description[key]
    description["prompts"] = " ".join(path.name for path in config.prompts)
    description["tokens"] = str(num_tokens)
    for path in config.prompts:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        description[f"sha256 of {path.name}"] = digest
    for layer, share in records.agreement().items():
        description[f"held-out agreement at {layer}"] = f"{share:.4f}"
    return description
