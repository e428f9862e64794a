"""Sensitivity of a model to 4 bits, and the weights that have 8 bits for that reason.

A product's score is the squared error of its layer's output, relative to the length of the vector,
that the 4 bits of its weights alone cause on real text. Products of one input are one product in
a graph, so their weights have equal bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from onnx_export.graph_weights import Weight
from onnx_export.grid import BLOCK_SIZE
from onnx_export.parity import Ids, embedded, run_model_layer
from onnx_export.quantize import product_grids
from onnx_export.streamed_model import LAYERS, StreamedModel

Group = dict[str, nn.Linear]
MARGIN: Final = 0.8
"""Share of the accepted disagreement that a first choice aims at."""
FIRST_SHARE: Final = 0.25
"""Share of the scores that stays where the agreement is met and another limit is not."""


@dataclass(frozen=True)
class ProductScore:
    """The score of one product: the names of its weights, and their number."""

    names: tuple[str, ...]
    num_weights: int
    score: float

    @property
    def score_per_weight(self) -> float:
        """The part of the score that 8 bits remove for each weight that they cost."""
        return self.score / self.num_weights

    @property
    def kind(self) -> str:
        """The weights' names within their layer, for example ``q_proj+k_proj+v_proj``."""
        return "+".join(name.split(".")[-2] for name in self.names)


def product_scores(model: StreamedModel, num_layers: int, window: Ids) -> list[ProductScore]:
    """Return the scores of the products of 4 bits in the first `num_layers` layers.

    `window` are token ids, int64 [1, s]. Each layer is read once.
    """
    (state,) = embedded(model, [window])
    scores: list[ProductScore] = []
    with torch.no_grad():
        for number in range(num_layers):
            layer = model.layer(number)
            forward = partial(run_model_layer, model, layer, state)
            groups = product_groups(layer, forward)
            state = forward()
            for group in groups:
                score = group_score(f"{LAYERS}{number}.", group, forward, state)
                scores += [] if score is None else [score]
    return scores


def product_groups(layer: Any, forward: Any) -> list[Group]:
    """Return the linear modules of a layer by name, those of one input together."""
    groups: dict[int, Group] = {}
    inputs: list[Tensor] = []  # kept, so that their ids are theirs alone

    def note(name: str, module: nn.Linear, args: tuple[Tensor, ...]) -> None:
        inputs.append(args[0])
        groups.setdefault(id(args[0]), {})[name] = module

    linear = {name: each for name, each in layer.named_modules() if isinstance(each, nn.Linear)}
    hooks = [
        module.register_forward_pre_hook(lambda module, args, name=name: note(name, module, args))
        for name, module in linear.items()
    ]
    forward()
    for hook in hooks:
        hook.remove()
    return list(groups.values())


def group_score(prefix: str, group: Group, forward: Any, expected: Tensor) -> ProductScore | None:
    """Return the score of one product; None for weights that have 8 bits in any case."""
    coarse: dict[str, Tensor] = {}
    for name, module in group.items():
        weight = in_four_bits(module.weight)
        if weight is None:
            return None
        coarse[name] = weight
    with replaced_weights(group, coarse):
        actual = forward()
    error = (actual - expected).norm(dim=-1) / expected.norm(dim=-1)
    return ProductScore(
        names=tuple(f"{prefix}{name}.weight" for name in group),
        num_weights=sum(weight.numel() for weight in coarse.values()),
        score=float(error.square().mean()),
    )


def in_four_bits(weight: Tensor) -> Tensor | None:
    """Return a weight [n, k] as 4 bits represent it, or None if it has 8 bits in any case."""
    n, k = weight.shape
    if k % BLOCK_SIZE:
        return None
    grids, bits = product_grids(Weight((k, n), (lambda: weight,), is_transposed=True))
    if bits != 4:
        return None
    return torch.from_numpy(np.concatenate([grid.weights for grid in grids], 1).T)


@contextmanager
def replaced_weights(group: Group, weights: dict[str, Tensor]) -> Iterator[None]:
    """Give linear modules other weights for a while."""
    own = {name: module.weight for name, module in group.items()}
    try:
        for name, module in group.items():
            module.weight = nn.Parameter(weights[name], requires_grad=False)
        yield
    finally:
        for name, module in group.items():
            module.weight = own[name]


def first_share(agreement: float, least: float) -> float:
    """Return the share of the scores that may stay: they are as the disagreement's square."""
    if agreement >= least:
        return FIRST_SHARE
    return float((MARGIN * (1 - least) / (1 - agreement)) ** 2)


def choose_raised(scores: Iterable[ProductScore], share: float) -> list[ProductScore]:
    """Return the products that lose most for each weight, until `share` of the scores stays."""
    ordered = sorted(scores, key=lambda each: each.score_per_weight, reverse=True)
    rest = sum(each.score for each in ordered)
    limit = share * rest
    chosen: list[ProductScore] = []
    for each in ordered:
        if rest <= limit:
            break
        chosen.append(each)
        rest -= each.score
    return chosen


def describe_raised(raised: Iterable[ProductScore]) -> str:
    """Return the number of products of each kind, for example ``down_proj 12, o_proj 3``."""
    counts: dict[str, int] = {}
    for each in raised:
        counts[each.kind] = counts.get(each.kind, 0) + 1
    return ", ".join(f"{kind} {count}" for kind, count in counts.items())
