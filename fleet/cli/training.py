"""`fleet heads train`, `profile` and `draw`: the model talks, and heads are fitted to what its layers see."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from fleet.exits.profile import Choice, choose, pareto
from fleet.exits.records import Records
from fleet.exits.thresholds import frontier
from fleet.utils.optional_imports import load

PLOTTED: Final = 6  # deepest layers
ModelOption = Annotated[str, typer.Option(help="'default', a hub name or a checkpoint's folder.")]
PromptsOption = Annotated[
    list[Path] | None,
    typer.Option(help="File of prompts, .jsonl or text, beside those that the model draws."),
]
NewTokensOption = Annotated[int, typer.Option("--max-new-tokens", help="Longest answer.")]
BatchOption = Annotated[int, typer.Option(help="Conversations that a process generates at once.")]
ProcessesOption = Annotated[
    int | None, typer.Option(help="That generate, on a CPU (default: one a core).")
]
SeedOption = Annotated[int, typer.Option(help="Of prompts, sampling and order.")]
CacheOption = Annotated[
    Path | None, typer.Option(help="Where answers are kept (default: the user's cache).")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def train(
    out: Annotated[Path, typer.Option(help="The heads file to write.")],
    exits: Annotated[str, typer.Option(help="Layers run before each exit, increasing.")],
    prompts: PromptsOption = None,
    model: ModelOption = "default",
    kind: Annotated[
        str, typer.Option(help="Of the heads: shared, linear, mlp or block.")
    ] = "linear",
    intermediate: Annotated[
        int, typer.Option(min=0, help="Width of an mlp head (0: the hidden size).")
    ] = 0,
    tokens: Annotated[
        int, typer.Option(help="Tokens of the model's own answers to learn from.")
    ] = 500_000,
    epochs: Annotated[float, typer.Option(help="Passes over them.")] = 3.0,
    max_new_tokens: NewTokensOption = 128,
    max_prompt_tokens: Annotated[int, typer.Option(help="Longer prompts are left out.")] = 128,
    batch: BatchOption = 192,
    processes: ProcessesOption = None,
    seed: SeedOption = 0,
    cache: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train exit heads on what the model itself says; interrupted, it goes on where it was."""
    records = run(
        out=out,
        exits=layers_of(exits),
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
        seed=seed,
        cache=cache,
    )
    agreement = records.agreement()
    if as_json:
        exits_json = {str(layer): {"agreement": share} for layer, share in agreement.items()}
        print(json.dumps({"heads": str(out), "held_out_tokens": len(records), "exits": exits_json}))
        return
    print_agreement(records)
    print(
        f"heads in {out}; next: fleet export --model {model} --exits {exits} --heads {out} --out DIR"
    )


def profile(
    prompts: PromptsOption = None,
    model: ModelOption = "default",
    layers: Annotated[str, typer.Option(help="Layers to look at, or 'all', or 'even'.")] = "even",
    target_agreement: Annotated[
        float, typer.Option(help="Overall agreement with the full model.")
    ] = 0.98,
    max_edge_cost: Annotated[
        float, typer.Option(help="Of a token, as a share of the full model's.")
    ] = 0.85,
    max_exits: Annotated[
        int, typer.Option(min=1, max=3, help="Exits that are tried together.")
    ] = 2,
    kind: Annotated[str, typer.Option(help="Of the heads; 'shared' trains nothing.")] = "linear",
    tokens: Annotated[
        int, typer.Option(help="Tokens of the model's own answers to learn from.")
    ] = 60_000,
    epochs: Annotated[float, typer.Option(help="Passes over them.")] = 2.0,
    max_new_tokens: NewTokensOption = 128,
    batch: BatchOption = 192,
    processes: ProcessesOption = None,
    seed: SeedOption = 0,
    cache: CacheOption = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw offload over agreement, *.svg or *.png.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show where exits pay: quick heads at many layers, their agreement, and what exits and split they suggest."""
    if plot:
        load("fleet.utils.plots").check_plot(plot)
    config = load("onnx_export.checkpoint").model_config(model)
    looked_at = {
        "all": tuple(range(1, config.num_hidden_layers)),
        "even": tuple(range(2, config.num_hidden_layers, 2)),
    }.get(layers) or layers_of(layers)
    with tempfile.TemporaryDirectory() as folder:
        records = run(
            out=Path(folder) / "heads.safetensors",
            exits=looked_at,
            prompts=tuple(prompts or ()),
            model=model,
            kind=kind,
            tokens=tokens,
            epochs=epochs,
            max_new_tokens=max_new_tokens,
            batch=batch,
            processes=processes,
            seed=seed,
            cache=cache,
        )
    lm_head = load("onnx_export.architecture").lm_head_layers(config)
    choices = choose(records, config.num_hidden_layers, lm_head, target_agreement, max_exits)
    affordable = [choice for choice in choices if choice.edge_cost <= max_edge_cost]
    best = min(
        affordable,
        key=lambda choice: (round(choice.offload_rate, 3), choice.edge_cost),
        default=None,
    )
    if plot is not None:
        curves = {
            f"exit {layer}": frontier(records.only([layer])) for layer in records.exits[-PLOTTED:]
        }
        title = f"{model}: one exit, heads trained on {tokens} tokens"
        load("fleet.utils.plots").save(load("fleet.exits.plot").plot_curves(title, curves), plot)
    if as_json:
        agreement = {str(layer): share for layer, share in records.agreement().items()}
        shown = [choice.json() for choice in choices]
        print(
            json.dumps(
                {"agreement": agreement, "choices": shown, "best": best.json() if best else None}
            )
        )
        return
    print_agreement(records)
    print_choices(pareto(choices), target_agreement)
    if best is None:
        print(
            f"no exits cost at most {max_edge_cost:.0%} of the full model's work; raise --max-edge-cost"
        )
    else:
        print(
            f"with at most {max_edge_cost:.0%} of the full model's work on the device: exits {best.name}"
        )


def draw(
    out: Annotated[Path, typer.Option(help="The text file to write, one prompt a line.")],
    count: Annotated[int, typer.Option(min=1, help="How many.")] = 300,
    model: ModelOption = "default",
    batch: BatchOption = 192,
    seed: SeedOption = 1,
) -> None:
    """Draw prompts from the model itself, for calibration or a test, when there are none of your own."""
    load("onnx_export.config").require_packages()
    columns = TextColumn("drawing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("drawing", total=count)
        drawn = load("onnx_export.training.train").draw(
            model, count, seed, batch, lambda done: bar.update(task, completed=done)
        )
    out.write_text("".join(" ".join(prompt.split()) + "\n" for prompt in drawn), encoding="utf-8")
    print(f"{count} prompts in {out}")


def run(*, cache: Path | None, processes: int | None, **options: Any) -> Records:
    """Trains with a progress bar a stage."""
    load("onnx_export.config").require_packages()
    training = load("onnx_export.training.train")
    config = training.TrainConfig(
        cache=cache or load("onnx_export.checkpoint").cache_folder() / "answers",
        processes=processes or len(os.sched_getaffinity(0)),
        **options,
    )
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        bars: dict[str, TaskID] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in bars:
                bars[stage] = bar.add_task(stage, total=total)
            bar.update(bars[stage], completed=min(done, total))

        records: Records = training.train_heads(config, progress)
    return records


def layers_of(exits: str) -> tuple[int, ...]:
    """Layers as the command line gives them."""
    return tuple(load("onnx_export.__main__").parse_numbers(exits, int, "--exits", "8,15"))


def print_agreement(records: Records) -> None:
    """One row an exit, with a bar."""
    table = Table(
        title=f"agreement with the full model on {len(records)} tokens that were not trained on"
    )
    table.add_column("exit", justify="right")
    table.add_column("agreement", justify="right")
    table.add_column("")
    for layer, share in records.agreement().items():
        table.add_row(str(layer), f"{share:.3f}", "█" * round(40 * share))
    Console().print(table)


def print_choices(choices: Sequence[Choice], agreement: float) -> None:
    """Choices of exits, cheapest first."""
    table = Table(title=f"exits worth their work, at agreement {agreement}")
    for header in ("exits", "work on the device", "offload"):
        table.add_column(header, justify="right")
    for choice in choices:
        table.add_row(choice.name, f"{choice.edge_cost:.0%}", f"{choice.offload_rate:.3f}")
    Console().print(table)
