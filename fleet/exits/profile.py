"""Which exits suit a device: offload against the work that a token costs there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np

from fleet.exits.records import Records
from fleet.exits.thresholds import best_thresholds, emitting


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Exits, the last of them the split, with their best thresholds for some agreement.

    `edge_cost`: mean work of a token on the device, as a share of the full model's; layers and LM head evaluations
    counted by their number of weights.
    """

    exits: tuple[int, ...]
    offload_rate: float
    agreement: float
    edge_cost: float
    thresholds: tuple[float, ...]

    @property
    def name(self) -> str:
        """The exits as the command line takes them."""
        return ",".join(map(str, self.exits))

    def json(self) -> dict[str, Any]:
        """As `fleet heads profile --json` prints it."""
        return asdict(self)


def choose(
    records: Records, num_layers: int, lm_head_layers: float, agreement: float, max_exits: int = 2
) -> list[Choice]:
    """Every set of up to `max_exits` of the recorded exits; `lm_head_layers`: an LM head's weights over a layer's."""
    choices = []
    for count in range(1, max_exits + 1):
        for exits in combinations(records.exits, count):
            seen = records.only(exits)
            point = best_thresholds(seen, agreement)
            cost = price(seen, point.thresholds, lm_head_layers) / (num_layers + lm_head_layers)
            choices.append(
                Choice(
                    exits=exits,
                    offload_rate=point.offload_rate,
                    agreement=point.agreement,
                    edge_cost=cost,
                    thresholds=point.thresholds,
                )
            )
    return choices


def price(records: Records, thresholds: Sequence[float], lm_head_layers: float) -> float:
    """Mean work of a token on the device, in layers.

    All layers up to the split count for every position: what an early exit leaves out is caught up as soon as a later
    token needs the deeper block, so it saves an LM head and time, but hardly any layer.
    """
    asked = np.minimum(emitting(records, thresholds) + 1, len(records.exits))
    return records.exits[-1] + float(asked.mean()) * lm_head_layers


def pareto(choices: Sequence[Choice]) -> list[Choice]:
    """Choices that no other beats in both work and offload, cheapest first."""
    kept: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.edge_cost, c.offload_rate)):
        if not kept or choice.offload_rate < kept[-1].offload_rate:
            kept.append(choice)
    return kept
