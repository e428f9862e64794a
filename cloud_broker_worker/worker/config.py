"""Settings of one worker, each with its default."""

from __future__ import annotations

import os
from typing import Annotated, Literal

from msgspec import Meta, Struct

Weights = Literal["float32", "int8", "int4"]


class WorkerConfig(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The settings that an operator may change on a worker."""

    num_threads: Annotated[int, Meta(ge=1, le=1024)] = min(8, os.cpu_count() or 1)
    # Of the upper layers; int8 and int4 give slightly different logits in less time.
    weights: Weights = "float32"
    kv_budget_bytes: Annotated[int, Meta(ge=1)] = 1 << 30
    max_batch_positions: Annotated[int, Meta(ge=1)] = 512
    # At a time, while no request waits; 0 runs only what is requested.
    run_ahead_positions: Annotated[int, Meta(ge=0)] = 64
    max_sessions_per_device: Annotated[int, Meta(ge=1)] = 8
    # Of the budget, for the caches of one device while others need memory.
    max_device_share: Annotated[float, Meta(gt=0, le=1)] = 0.5
    # Then a session may be dropped when another one needs its memory.
    idle_after_s: Annotated[float, Meta(ge=0)] = 10.0
    session_ttl_s: Annotated[float, Meta(gt=0)] = 300.0
    max_chunk_bytes: Annotated[int, Meta(ge=1024, le=256 * 1024)] = 96 * 1024
    window_bytes: Annotated[int, Meta(ge=1024)] = 1 << 20
    max_queued_messages: Annotated[int, Meta(ge=1)] = 1000
    retry_after_ms: Annotated[int, Meta(ge=0)] = 1000
    # The broker gives each `open` to one of the workers; else all receive it.
    shared_opens: bool = False
    drain_timeout_s: Annotated[float, Meta(ge=0)] = 30.0
