"""Cloud partition: upper layers, final norm and LM head as a Hugging Face checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch

from onnx_export.rotary_settings import portable_settings
from onnx_export.streamed_model import FINAL_NORM, LAYERS, LM_HEAD, StreamedModel
from onnx_export.variants import state_scale
from onnx_export.weights import DTYPES, TensorSpec

PER_LAYER: Final = ("layer_types", "no_rope_layers")  # settings with one value a layer
ALIGNMENT: Final = 8
DTYPE_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}


def write_cloud(model: StreamedModel, upload_layer: int, folder: Path) -> None:
    """Write layers from `upload_layer` on, the norm and an untied LM head, without embedding.

    Each weight keeps its type. One is in memory at a time.
    """
    folder.mkdir(parents=True)
    settings = portable_settings(cloud_config(model, upload_layer))
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    names = cloud_names(model, upload_layer)
    specs = {name: model.weights.specs[model.stored_name(names[name])] for name in names}
    # As safetensors does it: wide types first, so that each tensor is aligned.
    order = sorted(specs, key=lambda name: (-specs[name].dtype.itemsize, name))
    with (folder / "model.safetensors").open("wb") as file:
        file.write(safetensors_header({name: specs[name] for name in order}))
        for name in order:
            tensor = model.read(names[name]).contiguous()
            file.write(tensor.flatten().view(torch.uint8).numpy().data)


def cloud_config(model: StreamedModel, upload_layer: int) -> Any:
    """Return the transformers configuration of the smaller model."""
    config = model.config.to_dict()
    config["num_hidden_layers"] -= upload_layer
    config["tie_word_embeddings"] = False
    scale = state_scale(model.config)
    if scale != 1.0:
        config["state_scale"] = scale
    config["dtype"] = model.skeleton.lm_head.weight.dtype
    for key in PER_LAYER:
        values = config.get(key)
        if values:
            config[key] = values[upload_layer:]
    return type(model.config).from_dict(config)


def cloud_names(model: StreamedModel, upload_layer: int) -> dict[str, str]:
    """Return the names of the partition's weights in the model, by those in the smaller model."""
    names = {FINAL_NORM: FINAL_NORM, LM_HEAD: LM_HEAD}
    for number in range(upload_layer, model.num_layers):
        for name, stored in model.layer_names(number).items():
            names[f"{LAYERS}{number - upload_layer}.{name}"] = stored
    return names


def safetensors_header(specs: Mapping[str, TensorSpec]) -> bytes:
    """Return the beginning of a safetensors file with these tensors, in their order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    stop = 0
    for name, spec in specs.items():
        start = stop
        stop += spec.num_bytes
        header[name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": spec.shape,
            "data_offsets": [start, stop],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
