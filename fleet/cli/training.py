"""`fleet heads train`, `profile` and `draw`: exit heads fitted to the model's own answers."""

from __future__ import annotations

import json
import os
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from fleet.cli.options import (
    MAX_COUNT,
    MAX_NEW_TOKENS,
    MAX_ROWS,
    MAX_SEED,
    JsonOption,
    MemoryOption,
    PlotOption,
    memory_bytes,
)
from fleet.cli.progress import progress_bar, stage_progress
from fleet.cli.views import numbers_table
from fleet.exits.profile import ExitOption, pareto_front, profile_exits
from fleet.exits.records import Records
from fleet.exits.thresholds import frontier
from fleet.utils.console import new_console
from fleet.utils.optional_imports import needs
from fleet.utils.path_options import path_option
from fleet.utils.printable import print_line
from onnx_export.__main__ import parse_numbers
from onnx_export.architecture import lm_head_layers
from onnx_export.checkpoint import cache_folder, model_config
from onnx_export.config import DEFAULT_MODEL, require_packages
from onnx_export.training.config import TrainConfig

MAX_CURVES: Final = 6  # of the deepest layers
BAR_WIDTH: Final = 40

OutOption = Annotated[Path, path_option(help="File of the heads.")]
ExitsOption = Annotated[str, typer.Option(help="Layers run before each exit, increasing.")]
ModelOption = Annotated[str, typer.Option(help="'default', a hub name or a checkpoint's folder.")]
PromptsOption = Annotated[
    list[Path] | None,
    path_option(help="File of prompts, .jsonl or text, in addition to those the model draws."),
]
KindOption = Annotated[
    str, typer.Option(help="Kind of the heads: shared (no training), linear, mlp or block.")
]
IntermediateOption = Annotated[
    int, typer.Option(min=0, max=MAX_ROWS, help="Width of an mlp head (0: the hidden size).")
]
TrainingTokensOption = Annotated[
    int,
    typer.Option(
        min=1, max=MAX_COUNT, help="Number of tokens of the model's own answers to train on."
    ),
]
EpochsOption = Annotated[float, typer.Option(min=0, max=MAX_ROWS, help="Passes over these tokens.")]
NewTokensOption = Annotated[
    int,
    typer.Option(
        "--max-new-tokens", min=2, max=MAX_NEW_TOKENS, help="Maximum length of an answer."
    ),
]
MaxPromptTokensOption = Annotated[
    int,
    typer.Option(min=1, max=MAX_ROWS, help="Maximum length of a prompt; longer ones are left out."),
]
BatchOption = Annotated[
    int,
    typer.Option(
        min=1,
        max=MAX_ROWS,
        help="Maximum number of conversations that a process generates at once.",
    ),
]
ProcessesOption = Annotated[
    int | None,
    typer.Option(
        min=1, max=1024, help="Processes that generate, on a CPU (default: one per core)."
    ),
]
SeedOption = Annotated[
    int, typer.Option(min=0, max=MAX_SEED, help="Seed of prompts, sampling and order.")
]
CacheOption = Annotated[
    Path | None, path_option(help="Folder where answers are kept (default: the user's cache).")
]
LayersOption = Annotated[str, typer.Option(help="Layers to examine, or 'all', or 'even'.")]
TargetAgreementOption = Annotated[
    float, typer.Option(min=0, max=1, help="Overall agreement with the full model.")
]
MaxEdgeCostOption = Annotated[
    float,
    typer.Option(min=0, max=1, help="Maximum work for a token, as a share of the full model's."),
]
MaxExitsOption = Annotated[
    int, typer.Option(min=1, max=3, help="Maximum number of exits in one combination.")
]
PromptsOutOption = Annotated[Path, path_option(help="Text file of the prompts, one per line.")]
CountOption = Annotated[int, typer.Option(min=1, max=MAX_ROWS, help="Number of prompts.")]


def train(
    out: OutOption,
    exits: ExitsOption,
    prompts: PromptsOption = None,
    model: ModelOption = DEFAULT_MODEL,
    kind: KindOption = TrainConfig.kind,
    intermediate: IntermediateOption = TrainConfig.intermediate,
    tokens: TrainingTokensOption = TrainConfig.tokens,
    epochs: EpochsOption = TrainConfig.epochs,
    max_new_tokens: NewTokensOption = TrainConfig.max_new_tokens,
    max_prompt_tokens: MaxPromptTokensOption = TrainConfig.max_prompt_tokens,
    batch: BatchOption = TrainConfig.batch,
    processes: ProcessesOption = None,
    memory: MemoryOption = None,
    seed: SeedOption = TrainConfig.seed,
    cache: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train exit heads on the model's own answers; an interrupted training continues."""
    records = run_training(
        out=out,
        exits=parse_layers(exits),
        prompts=tuple(prompts or ()),
        model=model,
        kind=kind,
        intermediate=intermediate,
        tokens=tokens,
        epochs=epochs,
        max_new_tokens=max_new_tokens,
        max_prompt_tokens=max_prompt_tokens,
        batch=batch,
        processes=processes,
        memory=memory,
        seed=seed,
        cache=cache,
    )
    agreement = records.agreement()
    if as_json:
        exits_json = {str(layer): {"agreement": share} for layer, share in agreement.items()}
        print(json.dumps({"heads": str(out), "held_out_tokens": len(records), "exits": exits_json}))
        return
    print_agreement(records)
    export = ["fleet", "export", "--model", model, "--exits", exits, "--heads", str(out)]
    print_line(f"heads in {out}; next: {shlex.join(export)} --out DIR")


def profile(
    prompts: PromptsOption = None,
    model: ModelOption = DEFAULT_MODEL,
    layers: LayersOption = "even",
    target_agreement: TargetAgreementOption = 0.98,
    max_edge_cost: MaxEdgeCostOption = 0.85,
    max_exits: MaxExitsOption = 2,
    kind: KindOption = TrainConfig.kind,
    tokens: TrainingTokensOption = 60_000,
    epochs: EpochsOption = 2.0,
    max_new_tokens: NewTokensOption = TrainConfig.max_new_tokens,
    batch: BatchOption = TrainConfig.batch,
    processes: ProcessesOption = None,
    memory: MemoryOption = None,
    seed: SeedOption = TrainConfig.seed,
    cache: CacheOption = None,
    plot: PlotOption = None,
    as_json: JsonOption = False,
) -> None:
    """Suggest exits and split: train quick heads at many layers and compare their agreement."""
    if plot:
        with needs("plots"):
            from fleet.exits.plot import plot_curves
            from fleet.utils.plots import check_plot, save
        check_plot(plot)
    config = model_config(model)
    num_layers: int = config.num_hidden_layers
    with tempfile.TemporaryDirectory() as folder:
        records = run_training(
            out=Path(folder) / "heads.safetensors",
            exits=examined_layers(layers, num_layers),
            prompts=tuple(prompts or ()),
            model=model,
            kind=kind,
            tokens=tokens,
            epochs=epochs,
            max_new_tokens=max_new_tokens,
            batch=batch,
            processes=processes,
            memory=memory,
            seed=seed,
            cache=cache,
        )
    options = profile_exits(
        records, num_layers, lm_head_layers(config), target_agreement, max_exits
    )
    best = best_option(options, max_edge_cost)
    if plot:
        deepest = records.exits[-MAX_CURVES:]
        curves = {f"exit {layer}": frontier(records.only([layer])) for layer in deepest}
        title = f"{model}: one exit, heads trained on {tokens} tokens"
        save(plot_curves(title, curves), plot)
    if as_json:
        print(json.dumps(profile_json(records, options, best)))
    else:
        print_profile(records, options, best, target_agreement, max_edge_cost=max_edge_cost)


def examined_layers(text: str, num_layers: int) -> tuple[int, ...]:
    """The layers of `--layers`: all, the even ones, or a list."""
    if text == "all":
        return tuple(range(1, num_layers))
    if text == "even":
        return tuple(range(2, num_layers, 2))
    return parse_layers(text)


def best_option(options: Sequence[ExitOption], max_edge_cost: float) -> ExitOption | None:
    """The affordable exits with the lowest offload rate, the cheapest of equal ones."""
    affordable = (option for option in options if option.edge_cost <= max_edge_cost)
    by_offload = sorted(affordable, key=lambda each: (round(each.offload_rate, 3), each.edge_cost))
    return by_offload[0] if by_offload else None


def profile_json(
    records: Records, options: Sequence[ExitOption], best: ExitOption | None
) -> dict[str, Any]:
    """The output of `fleet heads profile --json`."""
    return {
        "agreement": {str(layer): share for layer, share in records.agreement().items()},
        "choices": [option.json() for option in options],
        "best": best.json() if best else None,
    }


def print_profile(
    records: Records,
    options: Sequence[ExitOption],
    best: ExitOption | None,
    target_agreement: float,
    *,
    max_edge_cost: float,
) -> None:
    """Print agreement, the options that pay, and the best one."""
    print_agreement(records)
    print_options(pareto_front(options), target_agreement)
    limit = f"at most {max_edge_cost:.0%} of the full model's work"
    if best is None:
        print_line(f"no exits cost {limit}; raise --max-edge-cost")
    else:
        print_line(f"with {limit} on the device: exits {best.name}")


def write_drawn_prompts(
    out: PromptsOutOption,
    count: CountOption = 300,
    model: ModelOption = DEFAULT_MODEL,
    batch: BatchOption = TrainConfig.batch,
    memory: MemoryOption = None,
    seed: SeedOption = 1,
) -> None:
    """Draw prompts from the model itself, for calibration or a test without own prompts."""
    require_packages()
    with needs("export"):
        from onnx_export.training.train import draw_training_prompts
    with progress_bar("drawing", count) as progress:
        prompts = draw_training_prompts(
            model, count, seed, batch, memory=memory_bytes(memory), progress=progress
        )
    out.write_text("".join(" ".join(prompt.split()) + "\n" for prompt in prompts), encoding="utf-8")
    print_line(f"{count} prompts in {out}")


def run_training(
    *, cache: Path | None, processes: int | None, memory: float | None, **options: Any
) -> Records:
    """Train with the progress of each stage on stderr."""
    require_packages()
    with needs("export"):
        from onnx_export.training.train import train_heads
    config = TrainConfig(
        cache=cache or cache_folder() / "answers",
        processes=processes or len(os.sched_getaffinity(0)),
        memory=memory_bytes(memory),
        **options,
    )
    with stage_progress() as report:
        return train_heads(config, report)


def parse_layers(text: str) -> tuple[int, ...]:
    """Layers from text such as "8,15"; raises ConfigError."""
    return tuple(parse_numbers(text, int, "--exits", "8,15"))


def print_agreement(records: Records) -> None:
    """Print a row for each exit, with a bar."""
    title = f"agreement with the full model on {len(records)} held-out tokens"
    table = numbers_table(title, ("exit", "agreement"))
    table.add_column("")
    for layer, share in records.agreement().items():
        table.add_row(str(layer), f"{share:.3f}", "█" * round(BAR_WIDTH * share))
    new_console().print(table)


def print_options(options: Sequence[ExitOption], agreement: float) -> None:
    """Print combinations of exits, cheapest first."""
    title = f"exits worth their work, at agreement {agreement}"
    table = numbers_table(title, ("exits", "work on the device", "offload"))
    for option in options:
        table.add_row(option.name, f"{option.edge_cost:.0%}", f"{option.offload_rate:.3f}")
    new_console().print(table)
