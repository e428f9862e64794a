"""The configuration of one training. It needs no PyTorch, so that the CLI reads its defaults."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fleet.errors import ConfigError
from onnx_export.config import DEFAULT_MODEL

if TYPE_CHECKING:
    from onnx_export.heads import HeadKind

MINIMUMS: Final = {"tokens": 1, "epochs": 0, "max_new_tokens": 2, "batch": 1, "processes": 1}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training: heads of one kind for `exits` of a model, from `tokens` tokens of its answers.

    `prompts`: files of prompts in addition to those that the model draws itself; may be empty.
    `cache`: folder of the answers. `intermediate`: width of an ``mlp`` head, or 0 for the hidden
    size. `batch`: conversations that a process generates at once; it decides the memory.
    `processes`: number of processes that generate on a CPU.
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
    seed: int = 0

    def check(self) -> None:
        """Raise ConfigError when a number is too small."""
        for name, minimum in MINIMUMS.items():
            value = getattr(self, name)
            if value < minimum:
                option = name.replace("_", "-")
                raise ConfigError(f"{option} {value}: expected at least {minimum}")
