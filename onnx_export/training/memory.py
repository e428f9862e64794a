"""An estimate of the memory of a process that generates answers."""

from __future__ import annotations

from typing import Any, Final

from onnx_export.architecture import head_dim
from onnx_export.training.corpus import CorpusConfig

GB: Final = 1e9
LIBRARIES_BYTES: Final = 400_000_000
MAX_TEMPLATE_TOKENS: Final = 32
FLOAT32_BYTES: Final = 4
FLOAT16_BYTES: Final = 2
NUM_LOGIT_COPIES: Final = 3


def generation_bytes(model: Any, num_parameters: int, config: CorpusConfig) -> int:
    """Return the memory of a process that answers `config.batch` of the longest prompts at once.

    It is the sum of libraries, weights, static KV cache, logits, and stored hidden states. `model`
    is the configuration of the model, which runs in float32.
    """
    num_columns = MAX_TEMPLATE_TOKENS + config.max_prompt_tokens + config.max_new_tokens
    num_positions = config.batch * num_columns
    cached = 2 * model.num_hidden_layers * model.num_key_value_heads * head_dim(model)
    stored = len(config.layers) * model.hidden_size * FLOAT16_BYTES
    weights = num_parameters * FLOAT32_BYTES
    logits = NUM_LOGIT_COPIES * config.batch * model.vocab_size * FLOAT32_BYTES
    return LIBRARIES_BYTES + weights + logits + num_positions * (cached * FLOAT32_BYTES + stored)


def memory_line(num_bytes: int, processes: int) -> str:
    """Return the message before answers are generated."""
    return (
        f"processes that generate answers: {processes}; memory of each: up to "
        f"{num_bytes / GB:.1f} GB; a smaller --batch needs less"
    )
