"""Trains exit heads: python -m onnx_export.train --exits 8,15 --prompts FILE.jsonl --out HEADS.safetensors

The model answers the prompts; each head learns to give the full model's distribution from an exit's hidden states:
first in closed form (ridge regression on the final hidden states), then by the Kullback-Leibler divergence.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fleet.command import run_command
from onnx_export.__main__ import parse_numbers
from onnx_export.config import DEFAULT_MODEL, DEFAULT_THRESHOLD, ExportConfig, require_packages

if TYPE_CHECKING:
    from torch import Tensor

    from onnx_export.corpus import States
    from onnx_export.heads import ExitHead


def report(name: str, heads: Mapping[int, ExitHead], lm_head: Tensor, states: States, console: Console) -> None:
    """Prints what `evaluate` finds on held-out positions."""
    from onnx_export.fitting import evaluate

    scores, offload = evaluate(heads, lm_head, states, DEFAULT_THRESHOLD)
    for layer, (agreement, share, among) in scores.items():
        line = f"{name}: exit {layer} agrees with the full model on {agreement:.3f} of {len(states)} held-out tokens; "
        console.print(f"{line}{share:.3f} are at or above {DEFAULT_THRESHOLD}, and {among:.3f} of those agree")
    console.print(f"{name}: offload rate at threshold {DEFAULT_THRESHOLD}: {offload:.3f}")


def train(
    out: Annotated[Path, typer.Option(help="The heads file to write.")],
    prompts: Annotated[list[Path], typer.Option(help="JSON lines with 'prompt' or 'instruction'; can be repeated.")],
    exits: Annotated[str, typer.Option(help="Layers run before each exit, increasing.")] = "8,15",
    answers: Annotated[
        Path | None, typer.Option(help="Earlier answers of the model: JSON lines, ids 'prompt' and 'answer'.")
    ] = None,
    model: Annotated[str, typer.Option(help="'default', a hub name or a checkpoint's folder.")] = DEFAULT_MODEL,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the model's own answers to learn from.")] = 150_000,
    epochs: Annotated[int, typer.Option(min=0, help="Passes of fine-tuning; 0 leaves the closed form.")] = 2,
    max_prompt_tokens: Annotated[int, typer.Option(min=1, help="Longer prompts are left out.")] = 128,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 128,
    seed: Annotated[int, typer.Option(help="Of sampling and shuffling.")] = 0,
) -> None:
    """Train one head for each exit of MODEL and write them to OUT."""
    require_packages()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from onnx_export.architecture import check_exits, check_model
    from onnx_export.checkpoint import resolve_model
    from onnx_export.corpus import collect, make_batches, read_answers, read_prompts
    from onnx_export.fitting import fine_tune, fit_ridge
    from onnx_export.heads import save_heads, shared_heads

    console = Console()
    config = ExportConfig(
        out=out.parent / f"{out.name}.bundle", exits=tuple(parse_numbers(exits, int, "--exits", "8,15"))
    )
    config.check()
    texts, earlier = read_prompts(prompts), read_answers(answers) if answers else []
    source = resolve_model(model, console.print)
    language_model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval().requires_grad_(False)
    check_model(language_model.config)
    check_exits(config, language_model.config.num_hidden_layers)
    generator = torch.Generator().manual_seed(seed)
    batches = make_batches(AutoTokenizer.from_pretrained(source), texts, max_prompt_tokens, generator)
    heads = shared_heads(config.exits, language_model.model.norm.weight, float(language_model.config.rms_norm_eps))
    lm_head = language_model.lm_head.weight.detach()
    with bar(console) as progress:
        task = progress.add_task("answering", total=tokens)
        states = collect(
            language_model,
            batches,
            config.exits,
            tokens,
            max_new_tokens,
            generator,
            lambda done: progress.update(task, completed=done),
            earlier,
        )
    training, held_out = states.split()
    report("untrained", heads, lm_head, held_out, console)
    for layer, head in heads.items():
        fit_ridge(head, training.exits[layer], training.final)
    save_heads(heads, out)
    report("closed form", heads, lm_head, held_out, console)
    if epochs:
        with bar(console) as progress:
            task = progress.add_task("fine-tuning", total=epochs * len(training))
            fine_tune(heads, lm_head, training, epochs, generator, lambda count: progress.advance(task, count))
        save_heads(heads, out)
        report("fine-tuned", heads, lm_head, held_out, console)
    console.print(f"heads for exits {exits} in {out}")


def bar(console: Console) -> Progress:
    """A progress bar with counts and the time left."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    )


def main() -> None:
    """Entry point."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(train)
    run_command("python -m onnx_export.train", app)


if __name__ == "__main__":
    main()
