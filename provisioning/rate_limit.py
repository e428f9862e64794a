"""A limit on the rate of each peer's requests."""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Callable
from typing import Final

MAX_PEERS: Final = 10_000


class RateLimit:
    """A token bucket for each peer: `burst` at once, then `per_minute`. For one thread.

    It has at most `MAX_PEERS` buckets, each with its tokens and the time of that count, and drops
    the one that has not been used for longest.
    """

    def __init__(
        self, per_minute: float, burst: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._per_s = per_minute / 60
        self._burst = burst
        self._clock = clock
        self._buckets: dict[str, tuple[float, float]] = {}

    def wait_s(self, peer: str) -> float:
        """Count a request of `peer` and return 0, or return the seconds until one is allowed."""
        now = self._clock()
        left, updated_at = self._buckets.pop(peer, (float(self._burst), now))
        left = min(self._burst, left + (now - updated_at) * self._per_s)
        is_allowed = left >= 1
        self._buckets[peer] = left - is_allowed, now
        if len(self._buckets) > MAX_PEERS:
            del self._buckets[next(iter(self._buckets))]
        return 0.0 if is_allowed else (1 - left) / self._per_s

    def refund(self, peer: str) -> None:
        """Take the last request of `peer` off the count."""
        if bucket := self._buckets.get(peer):
            left, updated_at = bucket
            self._buckets[peer] = min(self._burst, left + 1), updated_at


def peer_key(address: str) -> str:
    """Return the address, or the /64 of an IPv6 address: one client can have a whole /64."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return str(parsed)
