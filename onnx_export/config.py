"""Options of an export, and the rules that can be checked without loading a model."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, get_args

from fleet.bundles.manifest import PROMPT_FORMATS, PromptFormat
from fleet.errors import ConfigError, ExportError, MissingExtraError
from fleet.exits.exit_policy import check_threshold
from fleet.utils.cli_runtime import check_free
from fleet.utils.optional_imports import check_current_folder

Quantization = Literal["fp32", "int8", "balanced", "int4"]
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
    "filelock",
)
SHARED_HEAD: Final = "shared"


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """One export. An exit at 8 means that layers [0, 8) have run: layer ranges are half-open.

    `model` is ``default``, a hub name, a folder or a GGUF file. Without `heads` the exits share the
    model's final norm, except for the default model, whose trained heads ship with this package.
    `exit_head` ``shared`` makes them share it on purpose, for a model that was trained with early
    exits (LayerSkip, arXiv 2404.16710). `split_layer` is the exit up to which a device runs that
    has no other setting, by default the last. `uploads` are the exits whose hidden states can be
    uploaded, by default the split alone. `max_positions` bounds a session's length in tokens.
    `accept` lowers the agreement with PyTorch that the export requires. `graph_cache` is the folder
    of graphs that later exports reuse, by default one in the user's cache. `prompt_format` is
    ``chat`` by default if the tokenizer has a chat template, else ``raw``.
    """

    out: Path
    exits: tuple[int, ...]
    model: str = DEFAULT_MODEL
    heads: Path | None = None
    exit_head: str | None = None
    split_layer: int | None = None
    uploads: tuple[int, ...] = ()
    quantization: Quantization = "balanced"
    thresholds: tuple[float, ...] | None = None
    calibration: Path | None = None
    max_positions: int = 8192
    top_k: int = 64
    accept: float = 1.0
    prompt_format: PromptFormat | None = None
    graph_cache: Path | None = None

    @property
    def split(self) -> int:
        """The number of layers on a device that has no other setting."""
        return self.exits[-1] if self.split_layer is None else self.split_layer

    @property
    def upload_layers(self) -> tuple[int, ...]:
        """The exits whose hidden states can be uploaded."""
        return self.uploads or (self.split,)

    @property
    def upload(self) -> int:
        """The lowest exit whose hidden states can be uploaded, where the cloud's half begins."""
        return self.upload_layers[0]

    def top_k_of(self, vocab_size: int) -> int:
        """Return the number of candidates that the LM head gives for a vocabulary of this size."""
        return min(self.top_k, vocab_size)

    def check(self) -> None:
        """Check the values that no model could satisfy.

        Raises:
            ConfigError: a value is unknown, out of range or contradicts another.
            ExportError: the exits, the split or the upload layer do not fit each other.
        """
        if self.quantization not in QUANTIZATIONS:
            raise ConfigError(
                f"unknown quantization {self.quantization!r}: "
                f"expected one of {', '.join(QUANTIZATIONS)}"
            )
        if self.prompt_format not in (None, *PROMPT_FORMATS):
            raise ConfigError(
                f"unknown prompt format {self.prompt_format!r}: "
                f"expected one of {', '.join(PROMPT_FORMATS)}"
            )
        self._check_heads()
        self._check_layers()
        self._check_thresholds()
        if self.max_positions < 8 or self.top_k < 1:
            raise ConfigError(
                f"max positions {self.max_positions} and top-k {self.top_k}: "
                "expected at least 8 and 1"
            )
        if not 0 <= self.accept <= 1:
            raise ConfigError(f"accepted agreement {self.accept}: expected a number from 0 to 1")
        check_free(self.out)

    def _check_heads(self) -> None:
        if self.exit_head not in (None, SHARED_HEAD):
            raise ConfigError(
                f"unknown exit head {self.exit_head!r}: "
                f"expected {SHARED_HEAD!r}, or trained ones with --heads"
            )
        if self.exit_head and self.heads:
            raise ConfigError(
                f"--exit-head {self.exit_head} and --heads {self.heads}: give one of the two"
            )

    def _check_layers(self) -> None:
        check_order(self.exits)
        uploads = self.upload_layers
        exits = format_layers(self.exits)
        if list(uploads) != sorted(set(uploads)) or not set(uploads) <= set(self.exits):
            raise ExportError(
                f"upload layers {format_layers(uploads)}: expected increasing ones of the exits "
                f"{exits}"
            )
        if self.split not in self.exits or self.split < self.upload:
            raise ExportError(
                f"split {self.split}: expected one of the exits {exits}, "
                f"from the upload layer {self.upload} on"
            )

    def _check_thresholds(self) -> None:
        if self.thresholds and self.calibration:
            raise ConfigError("--thresholds and --calibration: give one of the two")
        if self.thresholds and len(self.thresholds) != len(self.exits):
            raise ConfigError(
                f"got {len(self.thresholds)} thresholds for {len(self.exits)} exits; "
                "give one for each"
            )
        for threshold in self.thresholds or ():
            check_threshold(threshold)


def check_order(exits: tuple[int, ...]) -> None:
    """Raise ExportError unless `exits` are layer counts from 1 that increase."""
    if not exits or list(exits) != sorted(set(exits)) or exits[0] < 1:
        raise ExportError(
            f"exits {format_layers(exits)}: expected increasing layer counts from 1, e.g. 8,15"
        )


def format_layers(layers: tuple[int, ...]) -> str:
    """Return layers in the command line's format, e.g. ``8,15``."""
    return ",".join(map(str, layers)) or "(none)"


def require_packages() -> None:
    """Check that the packages of an export are installed and can be imported.

    Raises:
        ConfigError: the current folder no longer exists.
        MissingExtraError: packages are missing; the message has all their names.
    """
    check_current_folder("export")
    missing = [name for name in EXTRA_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"the export needs {', '.join(missing)}, which is not installed: "
            "pip install 'cecollm-fleet[export]'"
        )
