"""Models and bundles that many tests share, made once a session."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from fleet.bundles.manifest import Bundle
from onnx_export.bundle import export_bundle
from onnx_export.config import ExportConfig, Quantization
from onnx_export.default_bundle import default_bundle
from onnx_export.heads import HeadKind
from tests.postgresql import empty_url as empty_url  # fixtures
from tests.postgresql import postgresql as postgresql
from tests.postgresql import registry_url as registry_url
from tests.tiny import make_tiny_checkpoint, make_tiny_heads

MakeTinyBundle = Callable[..., Bundle]


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
        upload_layer: int | None = None,
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
                upload_layer=upload_layer,
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
