"""A model is exported one weight at a time, in the type in which its checkpoint stores it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from fleet.bundles.manifest import Bundle
from fleet.errors import ExportError
from onnx_export import parity, resources
from onnx_export.bundle import export_bundle
from onnx_export.cloud import write_cloud
from onnx_export.config import ExportConfig
from onnx_export.graph_weights import DataFile, Weight
from onnx_export.resources import check_resources, export_sizes
from onnx_export.streamed_model import StreamedModel, load_whole_model, open_model
from onnx_export.weights import LoadedWeights, RandomWeights, TensorSpec
from tests.onnx_export.test_models import MODELS
from tests.tiny import make_tiny_checkpoint

NAMES: Final = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
GATE: Final = "model.layers.3.mlp.gate_proj.weight"


def make_shards(folder: Path, **changes: Tensor) -> Path:
    """Return a tiny checkpoint in two shards of bfloat16."""
    make_tiny_checkpoint(folder, tie_word_embeddings=False)
    whole = folder / "model.safetensors"
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(whole).items()} | changes
    names = sorted(tensors)
    shards = dict(zip(NAMES, (names[:20], names[20:]), strict=True))
    for shard, members in shards.items():
        save_file({name: tensors[name] for name in members}, folder / shard)
    weight_map = {name: shard for shard, members in shards.items() for name in members}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    whole.unlink()
    return folder


def open_tiny(folder: Path) -> StreamedModel:
    return open_model(str(folder), "tiny")


def config(out: Path, **options: Any) -> ExportConfig:
    return ExportConfig(out=out, exits=(1, 2), **options)


def test_a_checkpoint_of_several_files_gives_a_bundle_that_keeps_its_type(tmp_path: Path) -> None:
    checkpoint = make_shards(tmp_path / "model")
    out = tmp_path / "bundle"
    export_bundle(config(out, model=str(checkpoint), quantization="fp32", exit_head="shared"))
    bundle = Bundle.load(out)
    assert bundle.manifest.parity["hidden.2"] < 1e-4
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    cloud = load_file(bundle.path("cloud/model.safetensors"))
    assert {tensor.dtype for tensor in cloud.values()} == {torch.bfloat16}
    for name, tensor in model.model.layers[2:].state_dict().items():
        torch.testing.assert_close(cloud[f"model.layers.{name}"], tensor, rtol=0, atol=0)
    torch.testing.assert_close(cloud["lm_head.weight"], model.lm_head.weight, rtol=0, atol=0)
    written = json.loads(bundle.path("cloud/config.json").read_text())
    assert (written["dtype"], written["num_hidden_layers"]) == ("bfloat16", 2)


def test_the_cloud_partition_is_the_file_that_safetensors_writes(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    write_cloud(open_tiny(tiny_checkpoint), 1, tmp_path / "cloud")
    path = tmp_path / "cloud/model.safetensors"
    save_file(load_file(path), tmp_path / "expected", metadata={"format": "pt"})
    assert path.read_bytes() == (tmp_path / "expected").read_bytes()


def test_the_layers_are_on_no_device_until_one_is_needed(tiny_checkpoint: Path) -> None:
    model = open_tiny(tiny_checkpoint)
    assert {weight.device.type for weight in model.skeleton.model.layers.parameters()} == {"meta"}
    whole: Any = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    for name, weight in whole.model.layers[3].state_dict().items():
        torch.testing.assert_close(model.layer(3).state_dict()[name], weight, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi4-mini"])
def test_the_whole_model_is_the_one_that_transformers_loads(name: str, tmp_path: Path) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path / "model", **MODELS[name])
    own = load_whole_model(str(checkpoint), "tiny")
    expected: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    is_tied = own.lm_head.weight is own.model.embed_tokens.weight
    assert is_tied == own.config.tie_word_embeddings
    assert not any(parameter.requires_grad for parameter in own.parameters())
    ids = torch.arange(3, 40)[None]
    torch.testing.assert_close(own(ids).logits, expected(ids).logits, rtol=1e-3, atol=1e-4)
    assert own.generation_config.eos_token_id == expected.generation_config.eos_token_id


def test_a_missing_shard_is_refused_by_its_name(tmp_path: Path) -> None:
    checkpoint = make_shards(tmp_path / "model")
    (checkpoint / NAMES[1]).unlink()
    assert_refused(checkpoint, rf"cannot load model .* {NAMES[1]}")


def test_a_shard_that_was_cut_off_is_refused_by_its_name(tmp_path: Path) -> None:
    checkpoint = make_shards(tmp_path / "model")
    path = checkpoint / NAMES[1]
    path.write_bytes(path.read_bytes()[:-100])
    assert_refused(checkpoint, rf"cannot load model .*{NAMES[1]}: .* expected \d+ bytes within")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {"a": 1}}'])
def test_an_index_that_is_damaged_is_refused(text: str, tmp_path: Path) -> None:
    checkpoint = make_shards(tmp_path / "model")
    (checkpoint / "model.safetensors.index.json").write_text(text)
    assert_refused(checkpoint, r"index\.json is no index of weights")


def test_a_weight_that_the_index_promises_and_no_shard_has_is_refused(tmp_path: Path) -> None:
    checkpoint = make_shards(tmp_path / "model")
    tensors = load_file(checkpoint / NAMES[1])
    del tensors[GATE]
    save_file(tensors, checkpoint / NAMES[1])
    assert_refused(checkpoint, f"lacks 1 of its weights, such as {GATE}")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused_by_its_name(value: float, tmp_path: Path) -> None:
    weight = torch.zeros(128, 64, dtype=torch.bfloat16)
    weight[5, 5] = value
    model = open_tiny(make_shards(tmp_path / "model", **{GATE: weight}))
    with pytest.raises(ExportError, match=rf"{NAMES[1]}: {GATE} has values that are infinite"):
        model.layer(3)
    with pytest.raises(ValueError, match=f"{GATE} has values that are infinite"):
        LoadedWeights({GATE: weight}).read(GATE)


def assert_refused(checkpoint: Path, message: str) -> None:
    with pytest.raises(ExportError, match=message) as raised:
        open_tiny(checkpoint)
    assert "\n" not in str(raised.value)


def test_random_weights_are_the_same_at_each_reading() -> None:
    weights = RandomWeights({"a": (3, 4), "b": (3, 4), "norm": (4,)}, seed=1)
    assert torch.equal(weights.read("a"), weights.read("a"))
    assert not torch.equal(weights.read("a"), weights.read("b"))
    assert torch.equal(weights.read("norm"), torch.ones(4))
    assert weights.specs["a"] == TensorSpec(torch.bfloat16, (3, 4))


def test_a_weight_is_read_in_pieces_that_make_it_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnx_export.graph_weights.PIECE_WEIGHTS", 10)
    first, second = torch.randn(5, 4), torch.randn(3, 4)
    weight = Weight((4, 8), (lambda: first, lambda: second), is_transposed=True)
    assert [piece.shape for piece in weight.pieces()] == [(4, 2), (4, 2), (4, 1), (4, 2), (4, 1)]
    np.testing.assert_array_equal(weight.read(), torch.cat([first, second]).T)


def test_weights_in_a_data_file_are_aligned(tmp_path: Path) -> None:
    file = DataFile(tmp_path / "data")
    for name in "ab":
        tensor = file.store(name, np.ones(301, np.float32))
    offset = next(int(entry.value) for entry in tensor.external_data if entry.key == "offset")
    assert offset == 1216
    assert file.path.stat().st_size == offset + 301 * 4


def test_an_export_without_enough_memory_or_disk_is_refused_with_the_figures(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_tiny(tiny_checkpoint)
    options = config(tmp_path / "bundle")
    monkeypatch.setattr(resources, "free_memory", lambda: 500_000_000)
    with pytest.raises(ExportError, match=r"needs about 0\.7 GB of memory, 0\.5 GB are free"):
        check_resources(options, model)
    monkeypatch.setattr(resources, "free_memory", lambda: None)
    check_resources(options, model)
    monkeypatch.setattr(resources, "free_disk", lambda _: 1000)
    with pytest.raises(ExportError, match=r"GB of disk space for .*bundle and the cache"):
        check_resources(options, model)


def test_the_estimate_is_near_the_size_of_a_bundle(
    tiny_bundle: Bundle, tiny_checkpoint: Path
) -> None:
    options = config(tiny_bundle.folder, quantization="fp32")
    sizes = export_sizes(options, open_tiny(tiny_checkpoint))
    entries = {entry.path: entry.num_bytes for entry in tiny_bundle.manifest.files}
    assert entries["cloud/model.safetensors"] == pytest.approx(sizes.cloud, rel=0.1)
    assert entries["edge/lm_head.onnx.data"] == pytest.approx(sizes.preview, rel=0.1)
    assert entries["edge/embedding.npy"] == pytest.approx(sizes.tables, rel=0.1)


def test_a_lower_agreement_is_accepted_on_request() -> None:
    figures = {"same_as_pytorch.2": 0.3, "top1.2": 0.5, "hidden.2": 0.1}
    with pytest.raises(ExportError, match=r"top1\.2 is 0\.5, expected at least 0\.9"):
        parity.check_parity(figures, parity.parity_limits("balanced", "shared"))
    parity.check_parity(figures, parity.parity_limits("balanced", "shared", 0.3))
    with pytest.raises(ExportError, match=r"hidden\.2 is 0\.9"):
        parity.check_parity({"hidden.2": 0.9}, parity.parity_limits("balanced", "shared", 0.0))
