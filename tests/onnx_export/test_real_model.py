"""The default model's exports obey the same rules as the tiny one's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fleet.bundles.manifest import Bundle
from fleet.graphs.cascade import Cascade
from fleet.graphs.partition import Partition
from onnx_export import parity
from onnx_export.bundle import export_bundle
from onnx_export.config import ExportConfig
from onnx_export.default_bundle import EXITS as SHIPPED
from onnx_export.default_bundle import default_bundle

pytestmark = pytest.mark.real_model
EXITS = 2, 5  # tracing takes time for each layer, and all layers are built alike
TOKEN_IDS = np.random.default_rng(3).integers(3, 49152, (1, 12))


@pytest.fixture(scope="module")
def fp32_bundle(real_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The default model's edge without quantisation."""
    assert real_bundle.manifest.exits == SHIPPED  # so that the model has been fetched
    out = tmp_path_factory.mktemp("real") / "fp32"
    export_bundle(ExportConfig(out=out, exits=EXITS, exit_head="shared", quantization="fp32"))
    return Bundle.load(out)


def test_the_real_models_fp32_graphs_equal_pytorch(fp32_bundle: Bundle) -> None:
    assert max(fp32_bundle.manifest.parity[f"hidden.{layer}"] for layer in EXITS) < 1e-4


def test_the_real_models_chunks_equal_its_steps(fp32_bundle: Bundle) -> None:
    for chunks in ([1] * 12, [5, 1, 6]):
        inputs = parity.embed_tokens(fp32_bundle.folder / "edge", TOKEN_IDS)
        whole: list[NDArray[Any]] = [inputs]
        parts: list[NDArray[Any]] = np.split(inputs, np.cumsum(chunks)[:-1], axis=1)
        for i in range(len(EXITS)):
            one, many = (
                parity.BlockRunner(
                    fp32_bundle.path(f"edge/block_{i}.onnx"), fp32_bundle.manifest.model, 12
                )
                for _ in range(2)
            )
            whole = [one.run(x)[0] for x in whole]
            parts = [many.run(x)[0] for x in parts]
            assert parity.relative_error(np.concatenate(parts, 1), whole[0]) < 1e-4


def test_a_backlog_of_the_real_model_filled_later_leaves_the_same_caches(
    fp32_bundle: Bundle,
) -> None:
    partition = Partition(fp32_bundle, num_threads=2)
    late = Cascade(partition, 12)
    full = Cascade(partition, 12)
    for token_id in TOKEN_IDS[0].tolist():
        late.append([token_id])
        late.run(0)
        full.append([token_id])
        for block in range(len(EXITS)):
            full.run(block)
    assert (late.num_filled(0), late.num_filled(1)) == (12, 0)
    late.run(1)
    for block in range(len(EXITS)):
        for one, other in zip(late.caches(block), full.caches(block), strict=True):
            assert parity.relative_error(one, other) < 1e-4


def test_the_default_bundle_is_balanced_and_near_pytorch(real_bundle: Bundle) -> None:
    manifest = real_bundle.manifest
    assert (manifest.quantization, manifest.split_layer, manifest.upload_layer) == (
        "balanced",
        SHIPPED[-1],
        SHIPPED[-1],
    )
    assert manifest.model.eos_token_ids == (2,)
    parity.check_parity(manifest.parity, parity.parity_limits("balanced", "linear"))
    assert min(manifest.parity[f"same_as_pytorch.{layer}"] for layer in SHIPPED) >= 0.9


def test_a_built_default_bundle_is_returned_without_building(real_bundle: Bundle) -> None:
    lines: list[str] = []
    folder: Path = default_bundle(lines.append)
    assert (folder, lines) == (real_bundle.folder, [])
