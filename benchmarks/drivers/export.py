"""The export of a random model in a process of its own, so that its memory is the export's.

    python -m benchmarks.drivers.export --shape 1.1b --seed 0 --exits 5,11 --quantization balanced
        --out BUNDLE --graphs FOLDER

It prints its progress on stderr and one JSON object on stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.processes import memory_mb
from benchmarks.random_model import MAX_POSITIONS, SHAPES, ModelShape, random_model
from fleet.errors import FleetError
from fleet.utils.cli_runtime import run_command
from fleet.utils.free_memory import free_memory
from onnx_export.bundle import export_bundle
from onnx_export.config import SHARED_HEAD, ExportConfig, Quantization
from onnx_export.edge import Progress
from onnx_export.resources import GB, export_sizes
from onnx_export.streamed_model import StreamedModel


def export_config(
    shape: str, exits: tuple[int, ...], quantization: Quantization, out: Path, graphs: Path
) -> ExportConfig:
    """Return the export's options.

    No agreement with PyTorch is required, and no exit emits a token: both are chance in a random
    model.
    """
    return ExportConfig(
        out=out,
        exits=exits,
        model=f"random-{shape}",
        exit_head=SHARED_HEAD,
        quantization=quantization,
        thresholds=(1.0,) * len(exits),
        max_positions=MAX_POSITIONS,
        accept=0.0,
        graph_cache=graphs,
    )


def check_memory(config: ExportConfig, model: StreamedModel) -> None:
    """Raise FleetError unless both halves fit the memory at the same time."""
    sizes = export_sizes(config, model)
    needed = sum(sizes.blocks) + sizes.preview + sizes.tables + sizes.cloud
    memory = free_memory()
    if memory is not None and memory < needed:
        raise FleetError(
            f"the halves need about {needed / GB:.1f} GB of memory together, "
            f"{memory / GB:.1f} GB are free; end other programs, or choose a smaller --shape"
        )


def export_shape(shape: ModelShape, config: ExportConfig, seed: int) -> dict[str, float]:
    """Export a random model of a shape.

    Return the peak of this process's resident memory in MB (VmHWM), and the CPU seconds of all its
    threads.
    """
    start = time.process_time()

    def progress(line: str) -> None:
        print(f"{time.process_time() - start:6.0f} s of CPU: {line}", file=sys.stderr, flush=True)

    load = random_model(shape, seed)

    def load_checked(config: ExportConfig, progress: Progress) -> tuple[StreamedModel, Any]:
        model, tokenizer = load(config, progress)
        check_memory(config, model)
        return model, tokenizer

    export_bundle(config, progress, load=load_checked)
    peak = memory_mb(os.getpid())["peak_rss_mb"]
    return {"peak_rss_mb": peak, "cpu_seconds": time.process_time()}


def main() -> None:
    """Run the export of the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--exits", required=True)
    parser.add_argument("--quantization", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--graphs", type=Path, required=True)
    options = parser.parse_args()
    config = export_config(
        options.shape,
        tuple(map(int, options.exits.split(","))),
        options.quantization,
        options.out,
        options.graphs,
    )
    print(json.dumps(export_shape(SHAPES[options.shape], config, options.seed)))


if __name__ == "__main__":
    run_command("benchmarks.drivers.export", main)
