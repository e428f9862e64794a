"""A GGUF file is read one tensor at a time, with transformers' names, or refused in one line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter
from safetensors.torch import load_file
from torch import Tensor

from fleet.errors import ExportError
from onnx_export.checkpoint import load_config
from onnx_export.heads import model_fingerprint
from onnx_export.streamed_model import StreamedModel, load_whole_model, open_model
from tests.tiny import VOCAB_SIZE, make_tiny_checkpoint

GATE: Final = "blk.3.ffn_gate.weight"
PARTS: Final = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OTHERS: Final = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The weights of a tiny Llama, by transformers' names."""
    folder = make_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")
    tensors: dict[str, Tensor] = load_file(folder / "model.safetensors")
    return tensors


def gguf_name(name: str) -> str:
    """Return llama.cpp's name of a weight."""
    if name in OTHERS:
        return OTHERS[name]
    _, _, number, part = name.removesuffix(".weight").split(".", 3)
    return f"blk.{number}.{PARTS[part]}.weight"


def interleaved(weight: Tensor, num_heads: int) -> Tensor:
    """Return rows of a query or key weight in llama.cpp's order: pairs of one angle together."""
    halves = weight.view(num_heads, 2, -1, weight.shape[1])
    return halves.transpose(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path,
    weights: dict[str, Tensor],
    kind: Type = Type.F32,
    metadata: Mapping[str, float | str] | None = None,
    **changes: Any,
) -> Path:
    """Write a Llama's weights, with more `metadata`.

    A change of a tensor is its new values, or None for no tensor.
    """
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(4)
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(16)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(VOCAB_SIZE)
    writer.add_eos_token_id(2)
    for key, value in (metadata or {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_float32)(key, value)
    tensors: dict[str, Any] = {}
    for name, weight in weights.items():
        if "q_proj" in name or "k_proj" in name:
            weight = interleaved(weight, 4 if "q_proj" in name else 2)
        tensors[gguf_name(name)] = weight.numpy()
    for name, values in (tensors | changes).items():
        if values is not None:
            is_plain = values.ndim == 1
            stored = values if is_plain else gguf.quantize(values, kind)
            writer.add_tensor(name, stored, raw_dtype=Type.F32 if is_plain else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def open_gguf_model(path: Path) -> StreamedModel:
    return open_model(str(path), "tiny")


def test_each_weight_is_the_one_of_the_checkpoint(
    weights: dict[str, Tensor], tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "model.gguf", weights)
    model = open_gguf_model(path)
    assert set(model.weights.specs) == set(weights)
    for name, weight in weights.items():
        torch.testing.assert_close(model.read(name), weight, rtol=0, atol=0)
    config = load_config(str(path), "tiny")
    assert (config.num_hidden_layers, config.head_dim, config.eos_token_id) == (4, 16, 2)


def test_heads_are_trained_for_the_weights_that_an_export_reads(
    weights: dict[str, Tensor], tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "model.gguf", weights, Type.Q5_0)
    trained = load_whole_model(str(path), "tiny")
    exported = open_gguf_model(path)
    assert model_fingerprint(trained) == model_fingerprint(exported.skeleton)
    layer = exported.layer(3).state_dict()
    for name, weight in trained.model.layers[3].state_dict().items():
        torch.testing.assert_close(weight, layer[name], rtol=0, atol=0)


@pytest.mark.parametrize("kind", [Type.F16, Type.BF16, Type.Q8_0, Type.Q5_0, Type.Q4_1])
def test_a_weight_of_each_type_is_converted(
    kind: Type, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    model = open_gguf_model(write_gguf(tmp_path / "model.gguf", weights, kind))
    name = "model.layers.3.mlp.gate_proj.weight"
    expected = gguf.dequantize(gguf.quantize(weights[name].numpy(), kind), kind)
    np.testing.assert_array_equal(model.read(name).numpy(), expected)
    assert model.read(name).dtype == torch.float32


def test_a_file_is_not_kept_mapped(weights: dict[str, Tensor], tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", weights)
    model = open_gguf_model(path)
    model.read("model.norm.weight")
    assert str(path) not in Path("/proc/self/maps").read_text(encoding="utf-8")


def assert_refused(path: Path, message: str) -> None:
    with pytest.raises(ExportError, match=message) as raised:
        open_gguf_model(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("num_bytes", [0, 2, 100, -100])
def test_a_file_that_was_cut_off_is_refused(
    num_bytes: int, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "model.gguf", weights)
    path.write_bytes(path.read_bytes()[:num_bytes])
    assert_refused(path, r"model\.gguf is no whole GGUF file of a known form: ")


def test_a_file_that_is_cut_off_while_it_is_read_is_refused(
    weights: dict[str, Tensor], tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "model.gguf", weights)
    model = open_gguf_model(path)
    with path.open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(ExportError, match=r"blk\.3\.attn_q\.weight ends early"):
        model.layer(3)


def test_a_tensor_of_an_unknown_type_is_refused(weights: dict[str, Tensor], tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", weights)
    content = bytearray(path.read_bytes())
    place = content.index(GATE.encode()) + len(GATE) + 4 + 2 * 8
    content[place : place + 4] = (99).to_bytes(4, "little")
    path.write_bytes(content)
    assert_refused(path, "a tensor has the unknown type 99$")


def test_a_tensor_of_a_type_that_cannot_be_converted_is_refused(
    weights: dict[str, Tensor], tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "model.gguf", weights)
    content = bytearray(path.read_bytes())
    place = content.index(GATE.encode()) + len(GATE) + 4 + 2 * 8
    content[place : place + 4] = int(Type.I32).to_bytes(4, "little")
    path.write_bytes(content)
    assert_refused(path, rf"{GATE} has the type I32, which cannot be converted")


def test_a_missing_tensor_is_refused_by_its_name(
    weights: dict[str, Tensor], tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "model.gguf", weights, **{GATE: None})
    assert_refused(path, r"lacks 1 of its weights, such as model\.layers\.3\.mlp\.gate_proj")


def test_a_rotary_scaling_is_refused(weights: dict[str, Tensor], tmp_path: Path) -> None:
    factors: dict[str, Any] = {"rope_freqs.weight": np.ones(8, np.float32)}
    path = write_gguf(tmp_path / "model.gguf", weights, **factors)
    assert_refused(path, r"has a rotary scaling, rope_freqs\.weight")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_refused(
    value: float, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    gate = np.zeros((128, 64), np.float32)
    gate[3, 3] = value
    changes: dict[str, Any] = {GATE: gate}
    model = open_gguf_model(write_gguf(tmp_path / "model.gguf", weights, **changes))
    with pytest.raises(ExportError, match=rf"{GATE} has values that are infinite"):
        model.layer(3)


def test_a_file_that_is_missing_is_refused(tmp_path: Path) -> None:
    assert_refused(tmp_path / "none.gguf", "cannot load model 'tiny'")


@pytest.mark.parametrize(
    ("key", "value"), [("scaling.type", "yarn"), ("scaling.factor", 4.0), ("scale_linear", 2.0)]
)
def test_a_rotary_scaling_in_the_metadata_is_refused(
    key: str, value: float | str, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    metadata = {f"llama.rope.{key}": value}
    path = write_gguf(tmp_path / "model.gguf", weights, metadata=metadata)
    assert_refused(path, rf"llama\.rope\.{re.escape(key)} is .*; give the model as safetensors")


def test_metadata_that_scale_nothing_are_accepted(
    weights: dict[str, Tensor], tmp_path: Path
) -> None:
    metadata: dict[str, float | str] = {
        "llama.rope.scaling.type": "linear",
        "llama.rope.scaling.factor": 1.0,
    }
    model = open_gguf_model(write_gguf(tmp_path / "model.gguf", weights, metadata=metadata))
    assert set(model.weights.specs) == set(weights)


@pytest.mark.parametrize("name", ["MODEL.GGUF", "sha256-0a1b"])
def test_a_gguf_file_is_known_by_its_bytes_and_by_a_name_in_capitals(
    name: str, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    model = open_gguf_model(write_gguf(tmp_path / name, weights))
    assert set(model.weights.specs) == set(weights)


def test_a_folder_with_the_name_of_a_gguf_file_is_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").mkdir()
    assert_refused(tmp_path / "model.gguf", r"no config\.json in it")
