"""A rate limit for a client's packets: a token bucket."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple


class TokenRate(NamedTuple):
    """Tokens that a bucket gains in a second, and the most that it holds."""

    per_s: float
    burst: float


def spend_tokens(
    tokens: float, elapsed_s: float, cost: float, rate: TokenRate
) -> tuple[float, float]:
    """Return the tokens of a bucket after `elapsed_s` seconds and a packet, and the wait for debts.

    A packet's cost is known after it was handled, so a bucket can be in debt. Its owner's next
    packet is read after the wait, in seconds.
    """
    tokens = min(rate.burst, tokens + elapsed_s * rate.per_s) - cost
    return tokens, max(0.0, -tokens / rate.per_s)


class PacketBudget:
    """The bucket of one name, which all its connections share."""

    def __init__(self, rate: TokenRate, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._clock = clock
        self._tokens = rate.burst
        self._at = clock()

    def spend(self, cost: float) -> float:
        """Spend the cost of a packet; return the seconds until the next one may be read."""
        now = self._clock()
        self._tokens, wait_s = spend_tokens(self._tokens, now - self._at, cost, self._rate)
        self._at = now
        return wait_s
