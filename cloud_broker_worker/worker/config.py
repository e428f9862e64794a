"""Settings of one worker, each with its default."""

from __future__ import annotations

import os
from typing import Annotated, Final, Literal, get_args

from msgspec import Meta, Struct

from fleet.errors import ConfigError

Weights = Literal["float32", "bfloat16", "int8", "int4"]

AUTO: Final = "auto"
MIN_AGREEMENT: Final = 0.995
"""The share of the tokens of float32 that weights of the choice `AUTO` keep."""

NUM_SESSIONS: Final = 4
MAX_NUM_SESSIONS: Final = 100_000
MAX_THREADS: Final = 1024
MAX_KV_BUDGET_MB: Final = 1 << 24
MAX_DRAIN_S: Final = 86_400
MAX_LAYER: Final = 9999


def check_weight_format(weights: str) -> None:
    """Raise ConfigError, which lists the kinds of weights, unless `weights` is one or `AUTO`."""
    kinds = (AUTO, *get_args(Weights))
    if weights not in kinds:
        raise ConfigError(f"--weights {weights}: expected one of {', '.join(kinds)}")


class WorkerConfig(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The settings that an operator may change on a worker."""

    num_threads: Annotated[int, Meta(ge=1, le=MAX_THREADS)] = min(8, os.cpu_count() or 1)
    # Of the upper layers; the others give slightly different logits in less time and memory. The
    # commands choose by `default_weights.choose_weights` unless they are given.
    weights: Weights = "float32"
    # The lowest layer that is loaded; 0 is the lowest that devices of the bundle may need.
    from_layer: Annotated[int, Meta(ge=0, le=MAX_LAYER)] = 0
    kv_budget_bytes: Annotated[int, Meta(ge=1, le=MAX_KV_BUDGET_MB * 1_000_000)] = 1 << 30
    max_batch_positions: Annotated[int, Meta(ge=1)] = 512
    # Of long prefills in one step while several devices are served, so that a request that comes
    # meanwhile is soon served.
    max_shared_positions: Annotated[int, Meta(ge=1)] = 16
    # At a time, while no request waits; 0 runs only what is requested.
    run_ahead_positions: Annotated[int, Meta(ge=0)] = 64
    max_sessions_per_device: Annotated[int, Meta(ge=1)] = 8
    # Of the budget, for one device while others need memory; at most an equal share.
    max_device_share: Annotated[float, Meta(gt=0, le=1)] = 0.5
    # Then a session may be dropped when another one needs its memory.
    idle_after_s: Annotated[float, Meta(ge=0)] = 10.0
    session_ttl_s: Annotated[float, Meta(gt=0)] = 300.0
    max_chunk_bytes: Annotated[int, Meta(ge=1024, le=256 * 1024)] = 96 * 1024
    window_bytes: Annotated[int, Meta(ge=1024)] = 1 << 20
    max_queued_messages: Annotated[int, Meta(ge=1)] = 1000
    retry_after_ms: Annotated[int, Meta(ge=0)] = 1000
    # The broker gives each `open` to one of the workers. Otherwise all receive it.
    shared_opens: bool = False
    # Load the bundle's lower layers as well, so that devices may upload prompts as token ids.
    lower_layers: bool = False
    drain_timeout_s: Annotated[float, Meta(ge=0, le=MAX_DRAIN_S)] = 30.0
