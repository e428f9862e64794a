"""Trains exit heads: python -m onnx_export.train --exits 8,15 --prompts FILE.jsonl --out HEADS.safetensors

The model answers the prompts; each head learns to give the full model's distribution from an exit's hidden states:
first in closed form (ridge regression on the final hidden states), then by the Kullback-Leibler divergence.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from fleet.errors import FleetError
from onnx_export.__main__ import parse_numbers
from onnx_export.architecture import check_exits, check_model
from onnx_export.checkpoint import resolve_model
from onnx_export.config import DEFAULT_MODEL, DEFAULT_THRESHOLD, ExportConfig
from onnx_export.corpus import States, collect, make_batches, read_answers, read_prompts
from onnx_export.heads import ExitHead, save_heads, shared_heads

RIDGE = 1e-3
CHUNK = 512  # positions a step: their logits over the whole vocabulary are what takes memory
LEARNING_RATE = 5e-4

Tick = Callable[[int], None]


def fit_ridge(head: ExitHead, states: Tensor, final: Tensor) -> None:
    """Sets the adapter to the ridge regression of `final` on the normalised `states`, both [n, hidden]."""
    hidden = final.shape[1]
    gram, cross = torch.zeros(hidden, hidden, dtype=torch.float64), torch.zeros(hidden, hidden, dtype=torch.float64)
    with torch.no_grad():
        for x, y in zip(states.split(CHUNK), final.split(CHUNK), strict=True):
            normalised = head.norm(x.float()).double()
            gram += normalised.T @ normalised
            cross += normalised.T @ y.double()
        ridge = RIDGE * gram.diagonal().mean() * torch.eye(hidden, dtype=torch.float64)
        head.adapter.weight.copy_(torch.linalg.solve(gram + ridge, cross).T.float())


def fine_tune(
    heads: Mapping[int, ExitHead], lm_head: Tensor, train: States, epochs: int, generator: torch.Generator, tick: Tick
) -> None:
    """Minimises the divergence from the full model's distribution, over the full vocabulary, for all heads at once."""
    parameters = [parameter.requires_grad_(True) for head in heads.values() for parameter in head.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE)
    steps = epochs * -(-len(train) // CHUNK)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(train), generator=generator).split(CHUNK):
            with torch.no_grad():
                target = (train.final[rows].float() @ lm_head.T).softmax(-1)
            for layer, head in heads.items():
                logits = head(train.exits[layer][rows].float()) @ lm_head.T
                cross_entropy = logits.logsumexp(-1) - torch.linalg.vecdot(target, logits)
                cross_entropy.mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            tick(len(rows))
    for parameter in parameters:
        parameter.requires_grad_(False)


@torch.inference_mode()
def evaluate(
    heads: Mapping[int, ExitHead], lm_head: Tensor, states: States, threshold: float
) -> tuple[dict[int, tuple[float, float, float]], float]:
    """By exit: agreement with the full model's choice, share of confident positions, agreement among those.

    The second value is the offload rate: the share of positions where no exit is confident.
    """
    agrees: dict[int, list[Tensor]] = {layer: [] for layer in heads}
    confident: dict[int, list[Tensor]] = {layer: [] for layer in heads}
    for rows in torch.arange(len(states)).split(CHUNK):
        choice = (states.final[rows].float() @ lm_head.T).argmax(-1)
        for layer, head in heads.items():
            confidence, token_ids = (head(states.exits[layer][rows].float()) @ lm_head.T).softmax(-1).max(-1)
            agrees[layer].append(token_ids == choice)
            confident[layer].append(confidence >= threshold)
    scores, anyone = {}, torch.zeros(len(states), dtype=torch.bool)
    for layer in heads:
        right, sure = torch.cat(agrees[layer]), torch.cat(confident[layer])
        anyone |= sure
        among = (right & sure).sum() / sure.sum().clamp(min=1)
        scores[layer] = right.float().mean().item(), sure.float().mean().item(), among.item()
    return scores, 1 - anyone.float().mean().item()


def report(name: str, heads: Mapping[int, ExitHead], lm_head: Tensor, states: States, console: Console) -> None:
    """Prints what `evaluate` finds on held-out positions."""
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
    """Runs the command; an error of ours is one line and exit status 1."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(train)
    try:
        app(prog_name="python -m onnx_export.train")
    except FleetError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
