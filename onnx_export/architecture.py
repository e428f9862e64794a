"""Which models can be exported, and the sizes the rest of the export needs."""

from __future__ import annotations

from typing import Any, Final

from fleet.bundles.manifest import ModelInfo
from fleet.errors import ExportError
from onnx_export.config import check_order, show

SUPPORTED_MODEL_TYPES: Final = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
SUPPORTED_ROPE_TYPES: Final = (
    "default",
    "linear",
    "llama3",
    "yarn",
)  # their angles depend on the position alone

HEAD_DIM_MULTIPLE: Final = 16
"""What ONNX Runtime's attention takes when it rotates by itself."""


def check_model(config: Any) -> None:
    """Raises ExportError in one line when a transformers configuration is of no model that can be exported."""
    if config.model_type not in SUPPORTED_MODEL_TYPES:
        raise ExportError(
            f"model type {config.model_type!r} cannot be exported: expected one of {', '.join(SUPPORTED_MODEL_TYPES)}"
        )
    if getattr(config, "quantization_config", None):
        method = dict(config.quantization_config).get("quant_method", "unknown method")
        raise ExportError(
            f"a quantised checkpoint ({method}) cannot be exported: expected full weights; "
            "give the model that it was made from, the export quantises it with --quantization"
        )
    rope = getattr(config, "rope_scaling", None) or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in SUPPORTED_ROPE_TYPES:
        raise ExportError(
            f"rope scaling {rope_type!r} cannot be exported: its angles depend on the length; "
            f"expected one of {', '.join(SUPPORTED_ROPE_TYPES)}"
        )
    if getattr(config, "partial_rotary_factor", 1.0) not in (None, 1, 1.0):
        raise ExportError(
            f"partial rotary embedding ({config.partial_rotary_factor}) cannot be exported; expected 1.0"
        )
    if uses_sliding_window(config):
        raise ExportError(
            f"sliding-window attention (window {config.sliding_window}) cannot be exported; choose a model without it"
        )
    if head_dim(config) % HEAD_DIM_MULTIPLE:
        raise ExportError(
            f"attention heads of {head_dim(config)} dimensions cannot be exported: "
            f"expected a multiple of {HEAD_DIM_MULTIPLE}, which ONNX Runtime's attention needs"
        )


def uses_sliding_window(config: Any) -> bool:
    """Whether any layer looks back over less than the whole sequence."""
    if getattr(config, "sliding_window", None) is None:
        return False
    layer_types = getattr(config, "layer_types", None)
    return layer_types is None or "sliding_attention" in layer_types


def head_dim(config: Any) -> int:
    """Dimensions of one attention head."""
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def check_exits(exits: tuple[int, ...], num_layers: int) -> None:
    """Raises ExportError when `exits` do not increase or one is not inside a model of `num_layers` layers."""
    check_order(exits)
    if exits[-1] >= num_layers:
        raise ExportError(
            f"exits {show(exits)}: expected layers from 1 to {num_layers - 1}, "
            f"as the model has {num_layers} and the cloud needs at least one"
        )


def lm_head_layers(config: Any) -> float:
    """Weights of the LM head over those of one layer, from a transformers configuration."""
    hidden = config.hidden_size
    attention = (
        2 * hidden * head_dim(config) * (config.num_attention_heads + config.num_key_value_heads)
    )
    return float(config.vocab_size * hidden / (attention + 3 * hidden * config.intermediate_size))


def model_info(name: str, model: Any, max_positions: int) -> ModelInfo:
    """Sizes of a transformers causal model, with sessions bounded to `max_positions` tokens."""
    config = model.config
    eos = model.generation_config.eos_token_id
    eos = config.eos_token_id if eos is None else eos
    if eos is None:
        raise ExportError(
            f"model {name} names no end-of-sequence token; set eos_token_id in its config.json"
        )
    return ModelInfo(
        name=name,
        architecture=config.architectures[0] if config.architectures else type(model).__name__,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=head_dim(config),
        vocab_size=config.vocab_size,
        max_positions=min(max_positions, config.max_position_embeddings),
        eos_token_ids=tuple(eos) if isinstance(eos, list | tuple) else (eos,),
    )
