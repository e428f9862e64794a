"""Cloud partition: upper layers, final norm and LM head as a Hugging Face checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

LAYER_PREFIX = "model.layers."
PER_LAYER = ("layer_types", "no_rope_layers")  # settings with one value a layer


def write_cloud(model: Any, upload_layer: int, folder: Path) -> None:
    """Write layers from `upload_layer` on, the norm and an untied LM head, without embedding."""
    folder.mkdir(parents=True)
    cloud_config(model, upload_layer).save_pretrained(folder)
    tensors = cloud_tensors(model, upload_layer)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def cloud_config(model: Any, upload_layer: int) -> Any:
    """Return the transformers configuration of the smaller model."""
    config = model.config.to_dict()
    config["num_hidden_layers"] -= upload_layer
    config["tie_word_embeddings"] = False
    for key in PER_LAYER:
        values = config.get(key)
        if values:
            config[key] = values[upload_layer:]
    return type(model.config).from_dict(config)


def cloud_tensors(model: Any, upload_layer: int) -> dict[str, torch.Tensor]:
    """Return the partition's tensors by their names in the smaller model."""
    tensors = {"model.norm.weight": model.model.norm.weight}
    tensors["lm_head.weight"] = model.lm_head.weight
    for name, tensor in model.model.layers[upload_layer:].state_dict().items():
        tensors[LAYER_PREFIX + name] = tensor
    return {name: tensor.detach().float().contiguous() for name, tensor in tensors.items()}
