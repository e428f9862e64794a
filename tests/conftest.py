"""Models and bundles that many tests share, made once a session."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, Final

import pytest
from torch.onnx._internal import _lazy_import

from fleet.bundles.manifest import Bundle
from fleet.utils.optional_imports import without_garbage_collection
from onnx_export.bundle import export_bundle
from onnx_export.config import ExportConfig, Quantization
from onnx_export.default_bundle import default_bundle
from onnx_export.heads import HeadKind
from tests.postgresql import empty_url as empty_url  # fixtures
from tests.postgresql import postgresql as postgresql
from tests.postgresql import ready_sqlite as ready_sqlite
from tests.postgresql import registry_url as registry_url
from tests.tiny import make_tiny_checkpoint, make_tiny_heads

MakeTinyBundle = Callable[..., Bundle]

LONG_FILES: Final = (
    "system/test_faults_long.py",
    "system/test_certificate_life.py",
    "cli/test_retraining.py",
    "system/test_software_update.py",
    "onnx_export/test_models.py",
    "system/test_watchdog.py",
    "onnx_export/test_head_kinds.py",
    "system/test_rollouts.py",
    "packaging/test_lower_bounds.py",
    "system/test_calibration.py",
    "onnx_export/test_training.py",
    "deploy/test_recipes.py",
    "system/test_rollout_end_to_end.py",
    "onnx_export/test_real_model.py",
    "system/test_exact_under_faults.py",
    "fleet/registry/rollouts/test_steps.py",
    "system/test_operators_guide.py",
    "cli/test_operations.py",
    "benchmarks/test_edge.py",
    "packaging/test_edge_wheel.py",
    "api/test_clients.py",
    "system/test_up_workers.py",
    "onnx_export/test_export.py",
    "system/test_processes.py",
    "onnx_export/test_reuse.py",
    "system/test_scripted_link.py",
    "deploy/test_units.py",
    "system/test_two_workers.py",
    "system/test_splits.py",
)
"""Files that take long. Those that wait alternate with those that compute."""

# PyTorch's exporter parses the sources of its 500 operators again in each of a bundle's exports,
# for up to a second. They do not change, so a process of tests parses them once.
exporter: Any = vars(_lazy_import)["onnxscript_apis"]
vars(exporter)["get_torchlib_ops"] = cache(lambda: exporter.__getattr__("get_torchlib_ops")())

# pytest would format a record of each step that PyTorch traces.
logging.getLogger("torch.__trace").propagate = False


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Keep the garbage collector from the modules and the tests: none of them goes away."""
    with without_garbage_collection():
        yield
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the long files first: none of them then starts near the end and runs on alone."""
    tests = Path(__file__).parent
    rank = {tests / name: i for i, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add options for the length of the test of exact answers under faults."""
    parser.addoption(
        "--answers", type=int, default=5, help="prompts of the default model that are asked"
    )
    parser.addoption("--answer-tokens", type=int, default=48, help="tokens of each answer, at most")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Llama of 4 layers, hidden 64, 384 ids."""
    return make_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="session")
def tiny_heads(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """File of random heads for the tiny model's exits 1, 2 and 3."""
    return make_tiny_heads(
        tmp_path_factory.mktemp("heads") / "tiny.heads.safetensors", tiny_checkpoint
    )


@pytest.fixture(scope="session")
def make_tiny_bundle(
    tiny_checkpoint: Path, tiny_heads: Path, tmp_path_factory: pytest.TempPathFactory
) -> MakeTinyBundle:
    """Make each bundle of the tiny model once."""

    @cache
    def make(
        exits: tuple[int, ...] = (1, 2),
        split: int | None = None,
        upload_layer: int | tuple[int, ...] | None = None,
        quantization: Quantization = "fp32",
        kind: HeadKind = "linear",
    ) -> Bundle:
        out = tmp_path_factory.mktemp("bundle") / "tiny"
        heads = (
            tiny_heads
            if kind == "linear"
            else make_tiny_heads(out.with_name("heads"), tiny_checkpoint, kind=kind)
        )
        export_bundle(
            ExportConfig(
                out=out,
                exits=exits,
                model=str(tiny_checkpoint),
                heads=heads,
                split_layer=split,
                uploads=(upload_layer,) if isinstance(upload_layer, int) else upload_layer or (),
                quantization=quantization,
            )
        )
        return Bundle.load(out)

    return make


@pytest.fixture(scope="session")
def tiny_bundle(make_tiny_bundle: MakeTinyBundle) -> Bundle:
    """The tiny model in fp32 with exits 1 and 2."""
    return make_tiny_bundle((1, 2))


@pytest.fixture(scope="session")
def real_bundle() -> Bundle:
    """The default model's bundle, fetched and built if this machine has none yet."""
    return Bundle.load(default_bundle(lambda line: print(line, flush=True)))
