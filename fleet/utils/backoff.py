"""Exponential back-off with jitter, as a plain function."""

from __future__ import annotations

from typing import Final

FIRST_S: Final = 0.25
MAX_S: Final = 8.0
MAX_DOUBLINGS: Final = 10


def backoff_s(num_failures: int, random: float) -> float:
    """Seconds before the next try: doubled with each failure up to `MAX_S`.

    Half of it is multiplied by `random` from [0, 1).
    """
    wait_s = min(MAX_S, FIRST_S * 2.0 ** min(num_failures, MAX_DOUBLINGS))
    return wait_s * (0.5 + random / 2)
