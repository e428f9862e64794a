"""Settings of one worker, each with its default."""

from __future__ import annotations

import os
from typing import Annotated, Literal

from msgspec import Meta, Struct

Weights = Literal["float32", "int8", "int4"]


class WorkerConfig(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What an operator may set on a worker."""

    num_threads: Annotated[int, Meta(ge=1, le=1024)] = min(8, os.cpu_count() or 1)
    weights: Weights = (
        "float32"  # of the upper layers; int8 and int4 give slightly other logits in less time
    )
    kv_budget_bytes: Annotated[int, Meta(ge=1)] = 1 << 30
    max_batch_positions: Annotated[int, Meta(ge=1)] = 512
    run_ahead_positions: Annotated[int, Meta(ge=0)] = (
        64  # at a time, while nobody waits; 0 runs what is asked for only
    )
    max_sessions_per_device: Annotated[int, Meta(ge=1)] = 8
    max_device_share: Annotated[float, Meta(gt=0, le=1)] = (
        0.5  # of the budget, for caches, when others need it
    )
    idle_after_s: Annotated[float, Meta(ge=0)] = (
        10.0  # then a session may go when somebody else needs its memory
    )
    session_ttl_s: Annotated[float, Meta(gt=0)] = 300.0
    max_chunk_bytes: Annotated[int, Meta(ge=1024, le=256 * 1024)] = 96 * 1024
    window_bytes: Annotated[int, Meta(ge=1024)] = 1 << 20
    max_queued_messages: Annotated[int, Meta(ge=1)] = 1000
    retry_after_ms: Annotated[int, Meta(ge=0)] = 1000
    shared_opens: bool = (
        False  # the broker gives each `open` to one of the workers; else all get it
    )
    drain_timeout_s: Annotated[float, Meta(ge=0)] = 30.0
