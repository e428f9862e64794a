"""The choice of the positions that run next: a plain function, no tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

K = TypeVar("K")


def schedule(pending: Mapping[K, int], max_positions: int) -> dict[K, int]:
    """Return how many positions of each session run in one batch of at most `max_positions`.

    `pending` is in order of arrival, and no session waits for ever: when there are more sessions
    than `max_positions` the first ones run. Each gets an equal share, and the rest of a short one's
    share goes to the longer ones, so that a long prefill never delays short requests.
    """
    waiting = [(key, count) for key, count in pending.items() if count > 0][:max_positions]
    batch: dict[K, int] = {}
    room = max_positions
    for i, (key, count) in enumerate(sorted(waiting, key=lambda item: item[1])):
        batch[key] = min(count, room // (len(waiting) - i))
        room -= batch[key]
    return batch
