"""The configuration of one training. It needs no PyTorch, so that the CLI reads its defaults."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fleet.errors import ConfigError
from onnx_export.config import DEFAULT_MODEL

if TYPE_CHECKING:
    from onnx_export.heads import HeadKind

MIN_SHARD: Final = 8
ANSWER_SHARE: Final = 2 / 3
"""Expected length of an answer, as a share of the longest one."""

MINIMUMS: Final = {"tokens": 1, "epochs": 0, "max_new_tokens": 2, "batch": 1, "processes": 1}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training: heads of one kind for `exits` of a model, from `tokens` tokens of its answers.

    `prompts`: files of prompts in addition to those that the model draws itself; may be empty.
    `cache`: folder of the answers. `intermediate`: width of an ``mlp`` head, or 0 for the hidden
    size. `batch`: most conversations that a process generates at once.
    `processes`: number of processes that generate on a CPU. `memory`: bytes that all of them may
    use, which decides how many there are and how many conversations each generates at once.
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
    memory: int | None = None
    seed: int = 0

    @property
    def shard_size(self) -> int:
        """Conversations that are generated at once: `batch`, or fewer if half of `tokens` needs it.

        It does not depend on the exits, so that other runs with as many tokens use the answers.
        """
        num_answers = self.tokens / (ANSWER_SHARE * self.max_new_tokens)
        return min(self.batch, max(MIN_SHARD, math.ceil(num_answers / 2)))

    def check(self) -> None:
        """Raise ConfigError when a number is too small."""
        for name, minimum in MINIMUMS.items():
            value = getattr(self, name)
            if value < minimum:
                option = name.replace("_", "-")
                raise ConfigError(f"{option} {value}: expected at least {minimum}")
