"""Profile of exits for a device: offload against the work per token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np

from fleet.exits.records import Records
from fleet.exits.thresholds import best_thresholds, emitting_exits


@dataclass(frozen=True, kw_only=True)
class ExitOption:
    """Exits, the last of them the split, with their best thresholds for some agreement.

    `edge_cost`: mean work per token on the device, as a share of the full model's; layers and LM
    head evaluations count by their number of weights.
    """

    exits: tuple[int, ...]
    offload_rate: float
    agreement: float
    edge_cost: float
    thresholds: tuple[float, ...]

    @property
    def name(self) -> str:
        """The exits in the command line's format."""
        return ",".join(map(str, self.exits))

    def json(self) -> dict[str, Any]:
        """Return the entry of `fleet heads profile --json`."""
        return asdict(self)


def profile_exits(
    records: Records, num_layers: int, lm_head_layers: float, agreement: float, max_exits: int = 2
) -> list[ExitOption]:
    """Return an option for every set of up to `max_exits` of the recorded exits.

    `lm_head_layers` is an LM head's number of weights over a layer's.
    """
    options: list[ExitOption] = []
    for count in range(1, max_exits + 1):
        for exits in combinations(records.exits, count):
            subset = records.only(exits)
            point = best_thresholds(subset, agreement)
            layers = edge_layers_per_token(subset, point.thresholds, lm_head_layers)
            option = ExitOption(
                exits=exits,
                offload_rate=point.offload_rate,
                agreement=point.agreement,
                edge_cost=layers / (num_layers + lm_head_layers),
                thresholds=point.thresholds,
            )
            options.append(option)
    return options


def edge_layers_per_token(
    records: Records, thresholds: Sequence[float], lm_head_layers: float
) -> float:
    """Return the mean work per token on the device, in layers.

    All layers up to the split count for every position: the layers that an early exit skips run as
    soon as a later token needs the deeper block, so it saves an LM head and time, but hardly any
    layer.
    """
    evaluated_exits = np.minimum(emitting_exits(records, thresholds) + 1, len(records.exits))
    return records.exits[-1] + float(evaluated_exits.mean()) * lm_head_layers


def pareto_front(options: Sequence[ExitOption]) -> list[ExitOption]:
    """Return the options that no other beats in both work and offload, cheapest first."""
    front: list[ExitOption] = []
    for option in sorted(options, key=lambda option: (option.edge_cost, option.offload_rate)):
        if not front or option.offload_rate < front[-1].offload_rate:
            front.append(option)
    return front
