"""Exponential back-off with jitter, as a plain function."""

from __future__ import annotations


def backoff_s(num_failures: int, random: float) -> float:
    """Seconds before the next try: 0.25 doubled with each failure, at most 8, half of it by `random` from [0, 1)."""
    return float(min(8.0, 0.25 * 2.0 ** min(num_failures, 10)) * (0.5 + random / 2))
