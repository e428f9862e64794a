"""How often one peer may ask."""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Callable
from typing import Final

MAX_PEERS: Final = 10_000


class RateLimit:
    """A token bucket for each peer: `burst` at once, then `per_minute`. For one thread.

    It knows `MAX_PEERS` at most; whoever has been quiet for longest is forgotten first.
    """

    def __init__(
        self, per_minute: float, burst: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._per_s = per_minute / 60
        self._burst = burst
        self._clock = clock
        self._buckets: dict[
            str, tuple[float, float]
        ] = {}  # what is left, and when that was, oldest first

    def wait_s(self, peer: str) -> float:
        """0 when `peer` may ask now, which is counted; else after how many seconds it may."""
        now = self._clock()
        left, at = self._buckets.pop(peer, (float(self._burst), now))
        left = min(self._burst, left + (now - at) * self._per_s)
        is_allowed = left >= 1
        self._buckets[peer] = left - is_allowed, now
        if len(self._buckets) > MAX_PEERS:
            del self._buckets[next(iter(self._buckets))]
        return 0.0 if is_allowed else (1 - left) / self._per_s

    def give_back(self, peer: str) -> None:
        """What `peer` asked last does not count."""
        if known := self._buckets.get(peer):
            left, at = known
            self._buckets[peer] = min(self._burst, left + 1), at


def peer_of(address: str) -> str:
    """Who is behind an address: it alone, or for IPv6 its /64, of which everybody has more than enough addresses."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return str(parsed)
