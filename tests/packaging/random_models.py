"""Bundles of tiny random models, and a worker's logits, by one version of transformers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from cloud_broker_worker.worker.upper_layers import Chunk, UpperLayers
from fleet.bundles.manifest import Bundle
from tests.onnx_export.test_models import MODELS, ROPES, exit_layer, export
from tests.tiny import make_tiny_checkpoint

NAMES: Final = ("gemma3", "phi4-mini", "yarn")
"""Models whose rotary settings, or the arguments of whose layers, depend on the version."""
NUM_POSITIONS: Final = 20


def export_all(folder: Path, name: str) -> dict[str, Bundle]:
    """Export each model of `folder` under its subfolder `name`; make the models first if needed."""
    bundles = {}
    for model in NAMES:
        checkpoint = folder / model / "checkpoint"
        if not checkpoint.exists():
            make_tiny_checkpoint(checkpoint, **{"num_hidden_layers": 3} | (MODELS | ROPES)[model])
        target = folder / model / name
        target.mkdir()
        bundles[model] = export(target, checkpoint, exits=(exit_layer(model),))
        np.save(target / "logits.npy", worker_logits(bundles[model]))
    return bundles


def worker_logits(bundle: Bundle) -> NDArray[np.float32]:
    """Return a worker's logits [positions, vocab] after some hidden states, in two chunks."""
    size = (NUM_POSITIONS, bundle.manifest.model.hidden_size)
    rows = np.random.default_rng(3).normal(size=size).astype(np.float16)
    upper = UpperLayers(bundle, num_threads=1)
    lease = upper.new_pool(1 << 24).lease(NUM_POSITIONS)
    logits = [
        upper([Chunk(lease, rows[start:stop], start, stop, range(start, stop))]).numpy()
        for start, stop in ((0, 12), (12, NUM_POSITIONS))
    ]
    return np.concatenate(logits)


if __name__ == "__main__":
    export_all(Path(sys.argv[1]), sys.argv[2])
