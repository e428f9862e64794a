"""What an export is asked for, and the rules that can be checked without loading a model."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, get_args

from fleet.errors import ConfigError, ExportError, MissingExtraError
from fleet.policy import check_threshold

Quantization = Literal["fp32", "int8"]
QUANTIZATIONS: Final[tuple[str, ...]] = get_args(Quantization)
DEFAULT_MODEL: Final = "default"
DEFAULT_THRESHOLD: Final = 0.8
EXTRA_PACKAGES: Final = (
    "torch",
    "transformers",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "safetensors",
    "gguf",
    "accelerate",
)


@dataclass(frozen=True)
class ExportConfig:
    """One export. Layer numbers are half-open: an exit at 8 means that layers [0, 8) have run.

    `model` is ``default``, a hub name or a folder. Without `heads` the exits share the model's final norm, except for
    the default model, whose trained heads ship with this package. `split_layer` must be the last exit, which it is when
    left out; `upload_layer` is the split or an earlier exit. `max_positions` bounds a session's length in tokens.
    """

    out: Path
    exits: tuple[int, ...]
    model: str = DEFAULT_MODEL
    heads: Path | None = None
    split_layer: int | None = None
    upload_layer: int | None = None
    quantization: Quantization = "int8"
    thresholds: tuple[float, ...] | None = None
    max_positions: int = 8192
    top_k: int = 64

    @property
    def split(self) -> int:
        return self.exits[-1] if self.split_layer is None else self.split_layer

    @property
    def upload(self) -> int:
        return self.split if self.upload_layer is None else self.upload_layer

    @property
    def exit_thresholds(self) -> tuple[float, ...]:
        return self.thresholds or (DEFAULT_THRESHOLD,) * len(self.exits)

    def check(self) -> None:
        """Raises ConfigError or ExportError for what no model could satisfy."""
        if self.quantization not in QUANTIZATIONS:
            raise ConfigError(f"unknown quantization {self.quantization!r}: expected one of {', '.join(QUANTIZATIONS)}")
        if not self.exits or list(self.exits) != sorted(set(self.exits)) or self.exits[0] < 1:
            raise ExportError(f"exits {show(self.exits)}: expected increasing layer counts from 1, e.g. 8,15")
        if self.split != self.exits[-1]:
            raise ExportError(f"split {self.split}: expected the last exit, {self.exits[-1]}; leave --split out")
        if self.upload not in self.exits:
            raise ExportError(f"upload layer {self.upload}: expected one of the exits {show(self.exits)}")
        if len(self.exit_thresholds) != len(self.exits):
            raise ConfigError(
                f"got {len(self.exit_thresholds)} thresholds for {len(self.exits)} exits; give one for each"
            )
        for threshold in self.exit_thresholds:
            check_threshold(threshold)
        if self.max_positions < 8 or self.top_k < 1:
            raise ConfigError(f"max positions {self.max_positions} and top-k {self.top_k}: expected at least 8 and 1")
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise ConfigError(f"{self.out} exists and is not an empty folder; remove it or choose another --out")


def show(layers: tuple[int, ...]) -> str:
    """Layers as the command line takes them, e.g. ``8,15``."""
    return ",".join(map(str, layers)) or "(none)"


def require_packages() -> None:
    """Raises MissingExtraError naming what the export needs and is not installed."""
    missing = [name for name in EXTRA_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"the export needs {', '.join(missing)}, which is not installed: pip install 'cecollm-fleet[export]'"
        )
