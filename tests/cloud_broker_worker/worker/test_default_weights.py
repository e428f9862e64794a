"""The weights that a worker chooses at its start."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import UNSET
from msgspec.structs import replace
from safetensors.torch import load_file, save_file

from cloud_broker_worker.worker import default_weights
from cloud_broker_worker.worker.config import MIN_AGREEMENT, Weights
from cloud_broker_worker.worker.default_weights import (
    AGREEMENTS,
    FLAGS,
    SESSIONS,
    STEP_MS,
    choose_weights,
    processor_kind,
)
from cloud_broker_worker.worker.packed_linear import packed_layer
from fleet.bundles.manifest import Bundle
from fleet.errors import BundleError

DOCUMENT = Path(__file__).parents[3] / "docs" / "worker.md"
MODEL = "SmolLM2-135M-Instruct"
NUMBER = r"(\d+\.\d)"


def test_the_tables_are_those_of_the_document() -> None:
    text = DOCUMENT.read_text()
    agreements = dict(re.findall(r"^\| `(\w+)` \| (\d\.\d+) \|", text, re.MULTILINE))
    assert {MODEL: {kind: float(value) for kind, value in agreements.items()}} == AGREEMENTS
    columns = r" \| ".join([NUMBER] * len(SESSIONS))
    rows = re.findall(rf"^\| (\w+) \| `(\w+)` \| {columns} \|", text, re.MULTILINE)
    documented: dict[str, dict[str, tuple[float, ...]]] = {}
    for processor, kind, *times in rows:
        documented.setdefault(processor, {})[kind] = tuple(map(float, times))
    assert {MODEL: documented} == STEP_MS


def named(bundle: Bundle, name: str) -> Bundle:
    """Return a bundle whose model has this name."""
    manifest = bundle.manifest
    return Bundle(bundle.folder, replace(manifest, model=replace(manifest.model, name=name)))


def stored_as(bundle: Bundle, dtype: torch.dtype, folder: Path) -> Bundle:
    """Return a copy of a bundle that stores its upper layers in this type."""
    shutil.copytree(bundle.folder, folder)
    path = folder / "cloud/model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path)
    return Bundle(folder, bundle.manifest)


@pytest.mark.parametrize(
    ("processor", "num_sessions", "weights"),
    [
        ("amx", 1, "int4"),
        ("amx", 4, "int4"),
        ("amx", 16, "bfloat16"),
        ("avx512", 1, "int4"),
        ("avx512", 16, "int4"),
        ("avx512", 64, "float32"),
        ("avx2", 4, "int4"),
        ("avx2", 64, "float32"),
    ],
)
def test_a_known_model_has_the_fastest_weights_of_its_table_that_agree(
    processor: str,
    num_sessions: int,
    weights: str,
    tiny_bundle: Bundle,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(default_weights, "machine_flags", lambda: FLAGS[processor])
    choice = choose_weights(named(tiny_bundle, MODEL), 1, num_sessions)
    assert choice.weights == weights
    assert AGREEMENTS[MODEL][choice.weights] >= MIN_AGREEMENT
    assert choice.reason == (
        f"fastest for {num_sessions} sessions on {processor}, by the table of this model"
    )


def test_a_processor_is_of_the_best_kind_whose_flags_it_has() -> None:
    assert processor_kind({"avx2", "avx512f", "amx_bf16"}) == "amx"
    assert processor_kind({"avx2", "avx512f"}) == "avx512"
    assert processor_kind({"avx2", "amx_bf16"}) == "avx2"
    assert processor_kind({"asimddp"}) == ""


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[Weights, float]:
    """Times of a product by the kind of weights, instead of measured ones; those that were used."""
    times: dict[Weights, float] = {"float32": 1.0, "bfloat16": 2.0, "int8": 0.1, "int4": 0.2}

    def product_ms(file: Any, kinds: list[Weights], *_: int) -> dict[Weights, float]:
        del file
        for kind in times.keys() - set(kinds):
            del times[kind]
        return times

    monkeypatch.setattr(default_weights, "product_ms", product_ms)
    return times


def test_a_known_model_is_measured_on_another_processor(
    tiny_bundle: Bundle, measured: dict[Weights, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(default_weights, "machine_flags", frozenset)
    choice = choose_weights(named(tiny_bundle, MODEL), 1, 4)
    assert choice == ("int4", "fastest for 4 sessions as measured now")
    assert set(measured) == {"float32", "bfloat16", "int4"}  # int8 does not agree


def test_another_model_in_float32_keeps_it(
    tiny_bundle: Bundle, measured: dict[Weights, float]
) -> None:
    choice = choose_weights(tiny_bundle, 1, 4)
    assert choice == ("float32", "no other kind is known to agree on 99.5% of tokens")
    assert len(measured) == 4


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_another_model_in_16_bits_has_the_faster_of_two_kinds(
    stored: torch.dtype, tiny_bundle: Bundle, measured: dict[Weights, float], tmp_path: Path
) -> None:
    bundle = stored_as(tiny_bundle, stored, tmp_path / "bundle")
    assert choose_weights(bundle, 1, 4).weights == "float32"
    assert set(measured) == {"float32", "bfloat16"}


def test_float32_has_to_fit_the_memory(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = stored_as(tiny_bundle, torch.bfloat16, tmp_path / "bundle")
    monkeypatch.setattr(default_weights, "free_memory", lambda: 1000)
    assert choose_weights(bundle, 1, 4).weights == "bfloat16"


def test_products_are_really_measured_and_a_kind_without_a_kernel_is_left_out(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = stored_as(tiny_bundle, torch.bfloat16, tmp_path / "bundle")

    def without_float32(name: str, weight: Any, bias: Any, weights: Weights) -> Any:
        if weights == "float32":
            raise RuntimeError("no such kernel")
        return packed_layer(name, weight, bias, weights)

    monkeypatch.setattr(default_weights, "packed_layer", without_float32)
    choice = choose_weights(bundle, 1, 2)
    assert choice == ("bfloat16", "fastest for 2 sessions as measured now")


def test_a_bundle_without_readable_layers_is_refused_in_one_line(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_bundle.folder, tmp_path / "bundle")
    (folder / "cloud/model.safetensors").write_bytes(b"none")
    with pytest.raises(BundleError, match=r"cannot be read: .*; export the bundle again") as error:
        choose_weights(Bundle(folder, tiny_bundle.manifest), 1, 4)
    assert "\n" not in str(error.value)


def test_a_bundle_without_layers_for_a_worker_is_refused(tiny_bundle: Bundle) -> None:
    last = tiny_bundle.manifest.model.num_layers
    manifest = replace(tiny_bundle.manifest, exits=(last,), upload_layer=last, uploads=UNSET)
    with pytest.raises(BundleError, match="has no layers for a worker: its devices hold the whole"):
        choose_weights(Bundle(tiny_bundle.folder, manifest), 1, 4)
