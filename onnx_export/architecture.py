"""Model architectures that can be exported, and the sizes that the export reads from them."""

from __future__ import annotations

from typing import Any, Final

from fleet.bundles.manifest import ModelInfo
from fleet.errors import ExportError
from onnx_export.config import check_order, format_layers

SUPPORTED_MODEL_TYPES: Final = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
SUPPORTED_ROPE_TYPES: Final = ("default", "linear", "llama3", "yarn")
"""Rotary scalings whose angles depend on the position alone."""

SIZES: Final = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
)
NUMBERS: Final = ("rms_norm_eps", "rope_theta")
HEAD_DIM_MULTIPLE: Final = 16
"""Head sizes that ONNX Runtime's attention accepts when it rotates by itself."""


def check_model(config: Any) -> None:
    """Check that a transformers configuration is of a model that can be exported.

    Raises:
        ExportError: it is not; the message is one line.
    """
    if config.model_type not in SUPPORTED_MODEL_TYPES:
        raise ExportError(
            f"model type {config.model_type!r} cannot be exported: "
            f"expected one of {', '.join(SUPPORTED_MODEL_TYPES)}"
        )
    check_sizes(config)
    check_full_weights(config)
    check_rotary_embedding(config)
    if uses_sliding_window(config):
        raise ExportError(
            f"sliding-window attention (window {config.sliding_window}) cannot be exported; "
            "choose a model without it"
        )
    if head_dim(config) % HEAD_DIM_MULTIPLE:
        raise ExportError(
            f"attention heads of {head_dim(config)} dimensions cannot be exported: "
            f"expected a multiple of {HEAD_DIM_MULTIPLE}, which ONNX Runtime's attention needs"
        )


def check_sizes(config: Any) -> None:
    """Raise ExportError unless each size of the model is a whole number of at least 1.

    The other values that enter its computation have to be numbers, too.
    """
    for name in SIZES:
        size = getattr(config, name, None)
        if type(size) is not int or size < 1:
            raise ExportError(
                f"{name} is {size!r}: expected a whole number of at least 1; "
                "correct the checkpoint's config.json"
            )
    for name in NUMBERS:
        number = getattr(config, name, 1.0)
        if not isinstance(number, int | float):
            raise ExportError(
                f"{name} is {number!r}: expected a number; correct the checkpoint's config.json"
            )


def check_full_weights(config: Any) -> None:
    """Raise ExportError when the checkpoint is quantised."""
    quantization = getattr(config, "quantization_config", None)
    if quantization:
        method = dict(quantization).get("quant_method", "unknown method")
        raise ExportError(
            f"a quantised checkpoint ({method}) cannot be exported: expected full weights; "
            "give the model that it was made from, the export quantises it with --quantization"
        )


def check_rotary_embedding(config: Any) -> None:
    """Raise ExportError when rotary angles depend on the length or cover a head in part."""
    rope = getattr(config, "rope_scaling", None) or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in SUPPORTED_ROPE_TYPES:
        raise ExportError(
            f"rope scaling {rope_type!r} cannot be exported: its angles depend on the length; "
            f"expected one of {', '.join(SUPPORTED_ROPE_TYPES)}"
        )
    rotary_factor = getattr(config, "partial_rotary_factor", 1.0)
    if rotary_factor not in (None, 1, 1.0):
        raise ExportError(
            f"partial rotary embedding ({rotary_factor}) cannot be exported; expected 1.0"
        )


def uses_sliding_window(config: Any) -> bool:
    """Return whether any layer attends to less than the whole sequence."""
    if getattr(config, "sliding_window", None) is None:
        return False
    layer_types = getattr(config, "layer_types", None)
    return layer_types is None or "sliding_attention" in layer_types


def head_dim(config: Any) -> int:
    """Return the number of dimensions of one attention head."""
    explicit = getattr(config, "head_dim", None)
    return int(explicit or config.hidden_size // config.num_attention_heads)


def check_exits(exits: tuple[int, ...], last: int) -> None:
    """Check that `exits` increase and that none is above the layer `last`.

    Raises:
        ExportError: they do not.
    """
    check_order(exits)
    if exits[-1] > last:
        raise ExportError(
            f"exits {format_layers(exits)}: expected layers from 1 to {last} for this model"
        )


def lm_head_layers(config: Any) -> float:
    """Return the LM head's number of weights over that of one layer."""
    hidden = config.hidden_size
    heads = config.num_attention_heads + config.num_key_value_heads
    attention = 2 * hidden * head_dim(config) * heads
    mlp = 3 * hidden * config.intermediate_size
    return float(config.vocab_size * hidden / (attention + mlp))


def model_info(
    name: str, model: Any, max_positions: int, tokenizer: Any | None = None
) -> ModelInfo:
    """Return the sizes of a transformers causal model, sessions bounded to `max_positions` tokens.

    Its end-of-sequence tokens are those of :func:`eos_token_ids`.

    Raises:
        ExportError: the model has no end-of-sequence token.
    """
    config = model.config
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
        eos_token_ids=eos_token_ids(name, model, tokenizer),
    )


def eos_token_ids(name: str, model: Any, tokenizer: Any | None = None) -> tuple[int, ...]:
    """Return all end-of-sequence tokens of the configurations and the tokenizer, in order.

    Checkpoints often name the end of a turn in one of these places only, or only write it with
    their chat template, as those made of a GGUF file do. Ids without a row in the embedding are
    left out, as the model cannot generate them.

    Raises:
        ExportError: no token is left.
    """
    from onnx_export.tokenizer import turn_end_id  # which imports transformers

    ids: list[Any] = []
    for source in (model.config, model.generation_config, tokenizer):
        eos = getattr(source, "eos_token_id", None)
        ids += eos if isinstance(eos, list | tuple) else [eos]
    ids.append(turn_end_id(tokenizer))
    known = [each for each in range(model.config.vocab_size) if each in ids]
    if not known:
        raise ExportError(
            f"model {name} names no end-of-sequence token; set eos_token_id in its config.json"
        )
    return tuple(known)
