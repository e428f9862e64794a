"""Cloud partition: the upper layers, the final norm and the LM head as a Hugging Face checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

LAYER_PREFIX = "model.layers."
PER_LAYER = ("layer_types", "no_rope_layers")  # settings with one value a layer


def write_cloud(model: Any, upload_layer: int, folder: Path) -> None:
    """Layers [upload_layer, num_layers) renumbered from 0, with norm and untied LM head, float32; no embedding."""
    folder.mkdir(parents=True)
    config = model.config.to_dict()
    config["num_hidden_layers"] -= upload_layer
    config["tie_word_embeddings"] = False
    for key in PER_LAYER:
        if config.get(key):
            config[key] = config[key][upload_layer:]
    type(model.config).from_dict(config).save_pretrained(folder)
    path = folder / "model.safetensors"
    save_file(cloud_tensors(model, upload_layer), path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors makes it readable to its owner alone


def cloud_tensors(model: Any, upload_layer: int) -> dict[str, torch.Tensor]:
    """The partition's tensors by their names in the smaller model."""
    tensors = {"model.norm.weight": model.model.norm.weight, "lm_head.weight": model.lm_head.weight}
    for name, tensor in model.model.layers[upload_layer:].state_dict().items():
        tensors[LAYER_PREFIX + name] = tensor
    return {name: tensor.detach().float().contiguous() for name, tensor in tensors.items()}
