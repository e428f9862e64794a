"""What one edge step costs: block by block, LM head included, as ratios to the deepest exit's step.

python -m benchmarks.step [--bundle DIR] [--threads 2] [--steps 200]
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from edge_agent.cascade import Cascade
from edge_agent.partition import Partition
from fleet.cli.serve import resolve_bundle
from fleet.manifest import Bundle

PROMPT_LENGTH = 64


def run(
    bundle: Annotated[Path | None, typer.Option(help="Model bundle (default: the default model's).")] = None,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    steps: Annotated[int, typer.Option(min=1)] = 200,
) -> None:
    """Print medians of a step that stops at each exit, alternating, at positions from 64 on."""
    partition = Partition(Bundle.load(resolve_bundle(bundle, lambda line: print(line, file=sys.stderr))), threads)
    exits = partition.manifest.exits
    times: list[list[float]] = [[] for _ in exits]
    cascades = [Cascade(partition, PROMPT_LENGTH + steps) for _ in exits]
    for depth, cascade in enumerate(cascades):
        cascade.append(range(100, 100 + PROMPT_LENGTH))
        for block in range(depth + 1):
            cascade.run(block)
    for step in range(steps):
        for depth, cascade in enumerate(cascades):
            cascade.append([200 + step])
            start = time.perf_counter()
            for block in range(depth + 1):
                cascade.run(block)
            times[depth].append(time.perf_counter() - start)
    medians = [statistics.median(t) * 1000 for t in times]
    print(f"{partition.manifest.model.name}, {partition.manifest.quantization}, {threads} threads, {steps} steps")
    for layer, median in zip(exits, medians, strict=True):
        print(f"exit {layer:3d}: {median:6.2f} ms a token, {median / medians[-1]:.2f} of the deepest exit's")


if __name__ == "__main__":
    typer.run(run)
