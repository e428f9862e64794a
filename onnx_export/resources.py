"""Memory and disk space of an export, estimated and checked before the work."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fleet.errors import ExportError
from fleet.utils.free_memory import free_memory
from fleet.utils.paths import existing_folder
from onnx_export.config import ExportConfig, Quantization
from onnx_export.streamed_model import LM_HEAD, StreamedModel
from onnx_export.weights import EMBEDDING

GB: Final = 1e9
LIBRARIES_BYTES: Final = 700_000_000
FLOAT32_BYTES: Final = 4
PREVIEW_BYTES: Final = 0.57  # a weight of the LM head's first step, in blocks of 64
GRAPH_BYTES: Final[dict[Quantization, float]] = {
    "fp32": 4.0,
    "int8": 1.13,
    "balanced": 0.69,
    "int4": 0.69,
}
"""Bytes of a weight in a block's graph, with its share of scales and offsets."""
NUM_RUNNING_COPIES: Final = 2
"""Copies of a graph that runs: its file is mapped, and its weights are packed for the kernels."""


@dataclass(frozen=True, kw_only=True)
class ExportSizes:
    """Bytes of an export. `largest_weight` is in the stored type, `layer` is in float32."""

    layer: int
    blocks: tuple[int, ...]
    lm_head: int
    preview: int
    tables: int
    cloud: int
    largest_weight: int

    @property
    def disk(self) -> int:
        """Bytes of the bundle, and of its graphs in the cache."""
        graphs = sum(self.blocks) + self.preview
        return 2 * graphs + self.tables + self.cloud

    @property
    def memory(self) -> int:
        """Bytes of memory at the peak."""
        running = NUM_RUNNING_COPIES * (max(self.blocks) + self.preview) + self.tables
        quantising = max(self.blocks) // len(self.blocks) + 4 * self.largest_weight
        return LIBRARIES_BYTES + self.lm_head + max(running + self.layer, quantising)


def export_sizes(config: ExportConfig, model: StreamedModel) -> ExportSizes:
    """Return the sizes of an export of `model`."""
    specs = model.weights.specs
    layer = [specs[name] for name in model.layer_names(0).values()]
    layer_bytes = sum(spec.num_bytes for spec in layer)
    num_weights = sum(spec.num_weights for spec in layer)
    lm_head = specs[model.stored_name(LM_HEAD)]
    tables = {EMBEDDING, model.stored_name(LM_HEAD)}
    starts = (0, *config.exits[:-1])
    is_fp32 = config.quantization == "fp32"
    return ExportSizes(
        layer=num_weights * FLOAT32_BYTES,
        blocks=tuple(
            int((stop - start) * num_weights * GRAPH_BYTES[config.quantization])
            for start, stop in zip(starts, config.exits, strict=True)
        ),
        lm_head=lm_head.num_bytes,
        preview=int(lm_head.num_weights * (FLOAT32_BYTES if is_fp32 else PREVIEW_BYTES)),
        tables=len(tables) * lm_head.num_weights * (4 if is_fp32 else 2),
        cloud=(model.num_layers - config.upload) * layer_bytes + lm_head.num_bytes,
        largest_weight=max(spec.num_bytes for spec in (*layer, lm_head)),
    )


def check_resources(config: ExportConfig, model: StreamedModel) -> None:
    """Check that the export has the memory and the disk space that it needs.

    Raises:
        ExportError: it has not.
    """
    sizes = export_sizes(config, model)
    memory = free_memory()
    if memory is not None and memory < sizes.memory:
        raise ExportError(
            f"the export needs about {sizes.memory / GB:.1f} GB of memory, "
            f"{memory / GB:.1f} GB are free; end other programs, or choose exits that are closer "
            "together"
        )
    free_bytes = free_disk(config.out)
    if free_bytes < sizes.disk:
        raise ExportError(
            f"the export needs about {sizes.disk / GB:.1f} GB of disk space for {config.out} and "
            f"the cache, {free_bytes / GB:.1f} GB are free; make room and export again"
        )


def free_disk(path: Path) -> int:
    """Return the free bytes of the disk that holds `path`, or will."""
    return shutil.disk_usage(existing_folder(path.absolute())).free
