"""Parity: the worker's ragged batches against Hugging Face's forward of the whole model."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cloud_broker_worker.worker.config import Weights
from cloud_broker_worker.worker.kv_pool import KvLease
from cloud_broker_worker.worker.upper_layers import Chunk, UpperLayers
from fleet.bundles.manifest import Bundle
from fleet.bundles.tensor_file import TensorFile
from fleet.errors import BundleError
from fleet.protocol.hidden_states import Float16
from tests.cloud_broker_worker.worker.conftest import LayersAt, TinyModel

IDS = [list(range(10, 47)), [7, 300, 12, 99, 5], list(range(200, 320)), [42] * 64]


@dataclass
class Sequence:
    """Hidden states [n, hidden] of one session and its cache, of which nothing has run at first."""

    layers: UpperLayers
    rows: Float16

    def __post_init__(self) -> None:
        self.lease: KvLease = self.layers.new_pool(1 << 24).lease(len(self.rows))

    def chunk(self, start: int = 0, stop: int | None = None, num_outputs: int = 1) -> Chunk:
        stop = len(self.rows) if stop is None else stop
        return Chunk(
            self.lease, self.rows[start:stop], start, stop, range(stop - num_outputs, stop)
        )


@pytest.mark.parametrize("upload_layer", [1, 2, 3])
def test_the_upper_layers_equal_the_whole_model_at_every_upload_layer(
    layers_at: LayersAt, whole: TinyModel, upload_layer: int
) -> None:
    hidden = whole.upload(IDS[0], upload_layer)
    layers = layers_at(upload_layer)
    logits = layers([Sequence(layers, hidden).chunk(num_outputs=len(hidden))])
    torch.testing.assert_close(logits, whole.logits(hidden, upload_layer), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("upload_layer", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 7])
def test_chunks_give_at_every_end_what_the_whole_sequence_gives_there(
    layers_at: LayersAt, whole: TinyModel, upload_layer: int, size: int
) -> None:
    layers = layers_at(upload_layer)
    hidden = whole.upload(IDS[0], upload_layer)
    expected = whole.logits(hidden, upload_layer)
    sequence = Sequence(layers, hidden)
    for start in range(0, len(hidden), size):
        stop = min(start + size, len(hidden))
        logits = layers([sequence.chunk(start, stop)])
        torch.testing.assert_close(logits[0], expected[stop - 1], rtol=1e-4, atol=1e-4)
    assert sequence.lease.length == len(hidden)


def test_sessions_of_any_lengths_share_a_batch_and_each_equals_the_whole_model(
    layers_at: LayersAt, whole: TinyModel
) -> None:
    layers = layers_at(2)
    hidden = [whole.upload(ids, 2) for ids in IDS]
    sequences = [Sequence(layers, rows) for rows in hidden]
    nothing = layers([one.chunk(0, len(one.rows) // 2, num_outputs=0) for one in sequences])
    assert nothing.shape[0] == 0
    logits = layers([one.chunk(len(one.rows) // 2) for one in sequences])
    for row, rows in zip(logits, hidden, strict=True):
        torch.testing.assert_close(row, whole.logits(rows, 2)[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_others", [1, 2, 3])
@pytest.mark.parametrize(("start", "num_outputs"), [(0, 1), (0, 5), (20, 1), (36, 1), (30, 7)])
def test_another_session_in_the_batch_changes_no_logits(
    layers_at: LayersAt, whole: TinyModel, num_others: int, start: int, num_outputs: int
) -> None:
    layers = layers_at(2)
    rows = whole.upload(IDS[0], 2)

    def mine() -> Chunk:
        sequence = Sequence(layers, rows)
        if start:
            layers([sequence.chunk(0, start)])
        return sequence.chunk(start, num_outputs=num_outputs)

    alone = layers([mine()])
    others = [Sequence(layers, whole.upload(ids, 2)).chunk() for ids in IDS[1 : 1 + num_others]]
    together = layers([*others, mine()])[-num_outputs:]
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_a_position_that_runs_again_gives_the_same_logits_and_leaves_the_length(
    layers_at: LayersAt, whole: TinyModel
) -> None:
    layers = layers_at(2)
    rows = whole.upload(IDS[0], 2)
    sequence = Sequence(layers, rows)
    layers([sequence.chunk()])
    again = layers([sequence.chunk(20, 21)])
    assert sequence.lease.length == len(rows)
    torch.testing.assert_close(again[0], whole.logits(rows, 2)[20], rtol=1e-4, atol=1e-4)


@pytest.mark.real_model
def test_chunks_equal_the_whole_sequence_on_the_real_model(real_bundle: Bundle) -> None:
    layers = UpperLayers(real_bundle, num_threads=2)
    rows = (
        np.random.default_rng(0)
        .standard_normal((24, real_bundle.manifest.model.hidden_size))
        .astype(np.float16)
    )
    at_once = layers([Sequence(layers, rows).chunk()])
    sequence = Sequence(layers, rows)
    for start, stop in ((0, 10), (10, 11), (11, 23), (23, 24)):
        logits = layers([sequence.chunk(start, stop)])
    torch.testing.assert_close(logits, at_once, rtol=1e-4, atol=1e-3)


def test_a_partition_that_lacks_a_weight_is_refused_by_name_of_the_bundle(
    cloud_bundle: Callable[[int], Bundle], tmp_path: Path
) -> None:
    deeper = cloud_bundle(1)
    shallower = cloud_bundle(3)
    folder = tmp_path / "cloud"
    folder.mkdir()
    (folder / "config.json").write_bytes(deeper.path("cloud/config.json").read_bytes())
    (folder / "model.safetensors").write_bytes(
        shallower.path("cloud/model.safetensors").read_bytes()
    )
    with pytest.raises(BundleError, match=r"does not load: .* weights are missing"):
        UpperLayers(Bundle(tmp_path, deeper.manifest), num_threads=1)


def rewrite_tensors(source: Bundle, folder: Path, change: Callable[[Tensor], Tensor]) -> Bundle:
    """A cloud partition with changed tensors. The manifest is the old one."""
    (folder / "cloud").mkdir()
    config = source.path("cloud/config.json").read_bytes()
    (folder / "cloud/config.json").write_bytes(config)
    tensors = load_file(source.path("cloud/model.safetensors"))
    changed = {name: change(tensor) for name, tensor in tensors.items()}
    save_file(changed, folder / "cloud/model.safetensors")
    return Bundle(folder, source.manifest)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8", "int4"])
def test_weights_that_are_stored_in_16_bits_are_the_rounded_weights(
    cloud_bundle: Callable[[int], Bundle],
    whole: TinyModel,
    stored: torch.dtype,
    weights: Weights,
    tmp_path: Path,
) -> None:
    (tmp_path / "stored").mkdir()
    (tmp_path / "rounded").mkdir()
    source = cloud_bundle(2)
    bundle = rewrite_tensors(source, tmp_path / "stored", lambda tensor: tensor.to(stored))
    rounded = rewrite_tensors(
        source, tmp_path / "rounded", lambda tensor: tensor.to(stored).float()
    )
    rows = whole.upload(IDS[0], 2)
    logits, expected = (
        layers([Sequence(layers, rows).chunk(num_outputs=len(rows))])
        for layers in (UpperLayers(each, 1, weights) for each in (bundle, rounded))
    )
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-2)


def test_a_model_in_bfloat16_takes_half_the_bytes_of_float32(
    cloud_bundle: Callable[[int], Bundle],
) -> None:
    exact = UpperLayers(cloud_bundle(2), 1).weight_bytes
    assert UpperLayers(cloud_bundle(2), 1, "bfloat16").weight_bytes < 0.51 * exact


def test_a_partition_is_read_one_tensor_at_a_time(
    cloud_bundle: Callable[[int], Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tensor that was read is freed before the next one is read, unless it is kept in a layer."""
    alive: list[weakref.ref[Any]] = []
    most = 0
    read = TensorFile.read

    def read_and_count(file: TensorFile, name: str) -> Any:
        nonlocal most
        gc.collect(0)
        most = max(most, sum(each() is not None for each in alive))
        values = read(file, name)
        if values.ndim == 2:
            alive.append(weakref.ref(values))
        return values

    monkeypatch.setattr(TensorFile, "read", read_and_count)
    UpperLayers(cloud_bundle(2), 1, "bfloat16")
    assert len(alive) == 2 * 7 + 1
    assert most <= 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda tensor: tensor * math.nan, "values that are infinite or not a number"),
        (lambda tensor: tensor.double(), "has the type F64, expected one of F32, BF16, F16"),
        (lambda tensor: tensor[:-1].contiguous(), r"is \(.*\), expected \("),
    ],
)
def test_a_partition_with_other_values_is_refused_in_one_line(
    change: Callable[[Tensor], Tensor],
    reason: str,
    cloud_bundle: Callable[[int], Bundle],
    tmp_path: Path,
) -> None:
    bundle = rewrite_tensors(cloud_bundle(2), tmp_path, change)
    with pytest.raises(
        BundleError, match=rf"does not load: .*{reason}.*; export the bundle again"
    ) as error:
        UpperLayers(bundle, 1)
    assert "\n" not in str(error.value)
