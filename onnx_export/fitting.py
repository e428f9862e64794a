"""Fits exit heads to hidden states: in closed form, then by the divergence from the full model; and scores them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from onnx_export.corpus import States
from onnx_export.heads import ExitHead

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
