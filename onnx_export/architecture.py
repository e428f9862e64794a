"""Model architectures that can be exported, and the sizes that the export reads from them."""

from __future__ import annotations

import math
from typing import Any, Final

from msgspec import UNSET

from fleet.bundles.manifest import ModelInfo
from fleet.errors import ExportError
from onnx_export.config import check_order, format_layers
from onnx_export.rotary_settings import rotary_settings

SUPPORTED_MODEL_TYPES: Final = (
    "gemma2",
    "gemma3_text",
    "llama",
    "mistral",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
)
SUPPORTED_ROPE_TYPES: Final = ("default", "linear", "llama3", "yarn", "dynamic", "longrope")
"""Rotary scalings. The angles of the last two depend on the length of a longer sequence."""

SIZES: Final = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
)
OPTIONAL_SIZES: Final = ("sliding_window", "original_max_position_embeddings")
NUMBERS: Final = (
    "rms_norm_eps",
    "rope_theta",
    "rope_local_base_freq",
    "query_pre_attn_scalar",
)
OPTIONAL_NUMBERS: Final = (
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "partial_rotary_factor",
)
MAX_LAYERS: Final = 1_000
ROTARY_DIM_MULTIPLE: Final = 16
"""Sizes of a head, or of its rotated dimensions, that ONNX Runtime's attention rotates."""


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
    if getattr(config, "use_bidirectional_attention", False):
        raise ExportError(
            "attention to later positions (use_bidirectional_attention) cannot be exported; "
            "choose a model that generates text"
        )
    if head_dim(config) % ROTARY_DIM_MULTIPLE:
        raise ExportError(
            f"attention heads of {head_dim(config)} dimensions cannot be exported: "
            f"expected a multiple of {ROTARY_DIM_MULTIPLE}, which ONNX Runtime's attention needs"
        )


def check_sizes(config: Any) -> None:
    """Raise ExportError unless each size of the model is a whole number of at least 1.

    The other values that enter its computation have to be numbers above 0.
    """
    for name in SIZES + OPTIONAL_SIZES:
        size = getattr(config, name, None)
        if size is None and name in OPTIONAL_SIZES:
            continue
        if type(size) is not int or size < 1:
            raise ExportError(
                f"{name} is {size!r}: expected a whole number of at least 1; "
                "correct the checkpoint's config.json"
            )
    if config.num_hidden_layers > MAX_LAYERS:  # a module is made for each
        raise ExportError(
            f"num_hidden_layers is {config.num_hidden_layers:,}: expected at most {MAX_LAYERS:,}; "
            "correct the checkpoint's config.json, or get its file again"
        )
    rotary = rotary_settings(config)
    for name in NUMBERS + OPTIONAL_NUMBERS:
        number = rotary.get(name, getattr(config, name, 1.0))
        if number in (None, 0) and name in OPTIONAL_NUMBERS:
            continue
        if not isinstance(number, int | float) or not 0 < number < math.inf:
            raise ExportError(
                f"{name} is {number!r}: expected a finite number above 0; "
                "correct the checkpoint's config.json"
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
    """Raise ExportError when the rotary scaling is unknown, or a head is rotated in part.

    The layers of Phi-3 can rotate a part; those of the other models cannot.
    """
    if rope_type(config) not in SUPPORTED_ROPE_TYPES:
        raise ExportError(
            f"rope scaling {rope_type(config)!r} cannot be exported: "
            f"expected one of {', '.join(SUPPORTED_ROPE_TYPES)}"
        )
    factor = rotary_settings(config).get("partial_rotary_factor") or 1.0
    rotary_dim = int(head_dim(config) * factor)
    is_whole = rotary_dim == head_dim(config)
    if not is_whole and (config.model_type != "phi3" or rotary_dim % ROTARY_DIM_MULTIPLE):
        raise ExportError(
            f"partial rotary embedding ({factor}) cannot be exported: expected 1.0, or with phi3 "
            f"a part of {head_dim(config)} dimensions that is a multiple of {ROTARY_DIM_MULTIPLE}"
        )


def rope_type(config: Any) -> str:
    """Return the name of a model's rotary scaling."""
    rope = rotary_settings(config).get("rope_scaling") or {}
    name: str = rope.get("rope_type", rope.get("type", "default"))
    return name


def check_positions(config: Any, max_positions: int) -> None:
    """Raise ExportError when angles depend on the length of sessions of `max_positions` tokens."""
    longest = min(max_positions, config.max_position_embeddings)
    original = getattr(config, "original_max_position_embeddings", None) or longest
    if rope_type(config) == "longrope" and longest > original:
        raise ExportError(
            f"rope scaling 'longrope' with sessions of {longest} tokens cannot be exported: beyond "
            f"{original} tokens its angles depend on the length; give --max-positions {original}"
        )


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
        logit_cap=getattr(config, "final_logit_softcapping", None) or UNSET,
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
