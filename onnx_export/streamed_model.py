"""A model whose layers stay in its checkpoint until they are needed, one at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig

from fleet.bundles.decoder_variants import restore_rotary_embeddings
from fleet.errors import ExportError
from onnx_export.checkpoint import is_gguf, load_config, load_pretrained
from onnx_export.gguf_weights import GgufWeights
from onnx_export.weights import (
    EMBEDDING,
    CheckpointWeights,
    LoadedWeights,
    WeightSource,
    weight_files,
)

FINAL_NORM: Final = "model.norm.weight"
LM_HEAD: Final = "lm_head.weight"
LAYERS: Final = "model.layers."


class StreamedModel:
    """A transformers causal model and its weights.

    `skeleton` is the model on the meta device. Its final norm, in float32, its LM head, in the
    stored type, and its rotary embedding have values, which exit heads and comparisons need all
    the time.
    """

    def __init__(self, name: str, config: Any, weights: WeightSource) -> None:
        """Check the weights against the model of `config`.

        Raises:
            ExportError: the model lacks weights, or one has another shape or cannot be read.
        """
        self.name = name
        self.config = config
        self.weights = weights
        self.skeleton = make_skeleton(config)
        check_weights(name, self.skeleton, weights)
        norm = self.read(FINAL_NORM).float()
        self.skeleton.model.norm.weight = nn.Parameter(norm, requires_grad=False)
        self.skeleton.lm_head.weight = nn.Parameter(self.read(LM_HEAD), requires_grad=False)
        restore_rotary_embeddings(self.skeleton.model)

    @property
    def num_layers(self) -> int:
        """The number of layers of the whole model."""
        return int(self.config.num_hidden_layers)

    def stored_name(self, name: str) -> str:
        """Return the name under which a weight is stored; a tied LM head is the embedding."""
        is_tied = name == LM_HEAD and name not in self.weights.specs
        return EMBEDDING if is_tied else name

    def read(self, name: str) -> Tensor:
        """Return one weight in its stored type.

        Raises:
            ExportError: it cannot be read, or holds values that are not finite.
        """
        try:
            return self.weights.read(self.stored_name(name))
        except (OSError, ValueError) as error:
            raise ExportError(
                f"cannot read the weights of model {self.name!r}: {error}; give a whole checkpoint"
            ) from error

    def layer_names(self, number: int) -> dict[str, str]:
        """Return the names of a layer's weights in the model, by their names in the layer."""
        layer = self.skeleton.model.layers[number]
        return {name: f"{LAYERS}{number}.{name}" for name in layer.state_dict()}

    def layer(self, number: int) -> Any:
        """Return one layer in float32."""
        layer = copy.deepcopy(self.skeleton.model.layers[number])
        names = self.layer_names(number)
        weights = {name: self.read(stored).float() for name, stored in names.items()}
        layer.load_state_dict(weights, assign=True)
        return layer.requires_grad_(False)


def make_skeleton(config: Any) -> Any:
    """Return the transformers model of a configuration on the meta device."""
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="eager"
        )
    return skeleton.eval().requires_grad_(False)


def open_model(
    source: str, name: str, progress: Callable[[str], None] = lambda _: None
) -> StreamedModel:
    """Return the model `name` whose checkpoint is `source`, a folder or a name on the hub.

    Raises:
        ExportError: it cannot be loaded or is not whole.
    """
    config = load_config(source, name)
    try:
        model = StreamedModel(name, config, open_weights(source, name, config))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ExportError(
            f"cannot load model {name!r}: {reason}; expected a whole checkpoint"
        ) from error
    report_unused(model, progress)
    with suppress(OSError):  # a checkpoint need not have one
        model.skeleton.generation_config = GenerationConfig.from_pretrained(source)
    return model


def load_whole_model(
    source: str, name: str, dtype: torch.dtype = torch.float32, attention: str = "eager"
) -> Any:
    """Return a transformers model with all its weights, frozen: those that an export reads.

    Raises:
        ExportError: as :func:`open_model`.
    """
    streamed = open_model(source, name)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            streamed.config, dtype=dtype, attn_implementation=attention
        )
    weights = {key: streamed.read(key).to(dtype) for key, _ in model.named_parameters()}
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    model.generation_config = streamed.skeleton.generation_config
    return model.eval().requires_grad_(False)


def open_weights(source: str, name: str, config: Any) -> WeightSource:
    """Return a checkpoint's weights. Those of an older format than safetensors are loaded whole."""
    if is_gguf(source):
        return GgufWeights(Path(source), make_skeleton(config))
    paths = weight_files(source)
    if paths:
        return CheckpointWeights(paths)
    model = load_pretrained(AutoModelForCausalLM, source, name, config=config, dtype="auto")
    return LoadedWeights(model.state_dict())


def check_weights(name: str, skeleton: Any, weights: WeightSource) -> None:
    """Raise ExportError unless `weights` has each of the model's, in its shape."""
    expected = {key: tuple(tensor.shape) for key, tensor in skeleton.state_dict().items()}
    missing = sorted(expected.keys() - weights.specs.keys())
    if skeleton.config.tie_word_embeddings and LM_HEAD in missing:
        missing.remove(LM_HEAD)
    if missing:
        raise ExportError(
            f"model {name!r} lacks {len(missing)} of its weights, such as {missing[0]}; "
            "expected a whole causal language model"
        )
    for key, shape in expected.items():
        spec = weights.specs.get(key)
        if spec is not None and spec.shape != shape:
            raise ExportError(
                f"cannot load model {name!r}: size mismatch for {key}: it is {spec.shape} in the "
                f"checkpoint, expected {shape}; correct its config.json"
            )


def report_unused(model: StreamedModel, progress: Callable[[str], None]) -> None:
    """Report weights of a checkpoint that have no place in the model."""
    unused = sorted(model.weights.specs.keys() - model.skeleton.state_dict().keys())
    if unused:
        progress(
            f"{len(unused)} weights of the checkpoint have no place in the model, "
            f"such as {unused[0]}: left out"
        )
