"""The memory of processes that generate answers, and as many rows at once as it allows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from fleet.errors import ConfigError
from onnx_export.architecture import head_dim
from onnx_export.training.corpus import CorpusConfig

GB: Final = 1e9
LIBRARIES_BYTES: Final = 400_000_000
MAX_TEMPLATE_TOKENS: Final = 32
FLOAT32_BYTES: Final = 4
FLOAT16_BYTES: Final = 2
NUM_LOGIT_COPIES: Final = 3
MIN_ROWS: Final = 16
"""Rows at once below which fewer processes are faster than fewer rows."""


@dataclass(frozen=True, kw_only=True)
class GenerationPlan:
    """The number of processes, the conversations that each generates at once, and its bytes."""

    processes: int
    rows: int
    num_bytes: int

    @property
    def line(self) -> str:
        """The message before answers are generated."""
        return (
            f"processes that generate answers: {self.processes}; memory of each: up to "
            f"{self.num_bytes / GB:.1f} GB for {self.rows} conversations at once; "
            "--memory and --batch limit it"
        )


def generation_bytes(model: Any, num_parameters: int, config: CorpusConfig, rows: int) -> int:
    """Return the memory of a process that answers `rows` of the longest prompts at once.

    It is the sum of libraries, weights, static KV cache, logits, and the hidden states of a whole
    shard. `model` is the configuration of the model, which runs in float32.
    """
    num_columns = MAX_TEMPLATE_TOKENS + config.max_prompt_tokens + config.max_new_tokens
    cached = 2 * model.num_hidden_layers * model.num_key_value_heads * head_dim(model)
    stored = len(config.layers) * model.hidden_size * FLOAT16_BYTES
    logits = NUM_LOGIT_COPIES * model.vocab_size * FLOAT32_BYTES
    row_bytes = logits + num_columns * cached * FLOAT32_BYTES
    shard_bytes = config.batch * num_columns * stored
    return loaded_bytes(num_parameters) + shard_bytes + rows * row_bytes


def loaded_bytes(num_parameters: int) -> int:
    """Return the memory of a process that has loaded the model in float32."""
    return LIBRARIES_BYTES + num_parameters * FLOAT32_BYTES


def plan_generation(
    model: Any,
    num_parameters: int,
    config: CorpusConfig,
    *,
    processes: int,
    memory: int | None,
    own_bytes: int = 0,
) -> GenerationPlan:
    """Return the most processes and rows that need at most `memory` bytes, or any if it is None.

    `own_bytes` of them are this process's, which is none of those that generate.

    Raises:
        ConfigError: a single row needs more.
    """
    process_bytes = partial(generation_bytes, model, num_parameters, config)
    if memory is None:
        rows = config.batch
        return GenerationPlan(processes=processes, rows=rows, num_bytes=process_bytes(rows))
    free = memory - own_bytes
    row_bytes = process_bytes(1) - process_bytes(0)
    for count in range(processes, 0, -1):
        rows = min(config.batch, (free // count - process_bytes(0)) // row_bytes)
        if rows >= (min(MIN_ROWS, config.batch) if count > 1 else 1):
            return GenerationPlan(processes=count, rows=rows, num_bytes=process_bytes(rows))
    needed = own_bytes + process_bytes(1)
    raise ConfigError(
        f"to generate text needs at least {needed / GB:.1f} GB of memory, "
        f"{memory / GB:.1f} GB may be used; end other programs, or give --memory {needed / GB:.1f}"
    )
