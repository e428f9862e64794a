"""Which positions run next: a plain function, no tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

K = TypeVar("K")


def schedule(pending: Mapping[K, int], max_positions: int) -> dict[K, int]:
    """How many positions of each session run in one batch of at most `max_positions`.

    Sessions with few pending positions go first, so that a long prefill, which is cut to what is left, never holds up
    short assists.
    """
    batch: dict[K, int] = {}
    room = max_positions
    for key, count in sorted(pending.items(), key=lambda item: item[1]):
        if room == 0:
            break
        if count > 0:
            batch[key] = min(count, room)
            room -= batch[key]
    return batch
