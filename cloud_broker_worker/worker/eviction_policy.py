"""The choice of the sessions and caches that are evicted: plain functions over sessions, which
change nothing.

A session in use (a job waits, or a message came lately) has a claim to its cache, an idle one only
to its hidden states. A newcomer is admitted when its own claims fit next to all others: so caches
are evicted when idle sessions wake up, and not by every job in turn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from cloud_broker_worker.worker.kv_pool import KvShape
from cloud_broker_worker.worker.session import Session
from fleet.errors import PoolFullError


@dataclass(frozen=True, kw_only=True)
class MemoryLimits:
    """Bytes for everything, bytes for one device's caches while others need some, and sessions a
    device.

    A session is idle when it has not been used for `idle_after_s` seconds.
    """

    shape: KvShape
    budget_bytes: int
    share_bytes: float
    max_sessions_per_device: int
    idle_after_s: float

    def cache_bytes(self, num_positions: int) -> int:
        return num_positions * self.shape.cache_bytes

    def hidden_bytes(self, num_positions: int) -> int:
        return num_positions * self.shape.hidden_bytes

    def is_idle(self, session: Session, now: float) -> bool:
        return session.job is None and session.last_used <= now - self.idle_after_s


def sessions_to_drop(
    sessions: Collection[Session], device: str, num_positions: int, limits: MemoryLimits, now: float
) -> list[Session]:
    """Return the idle sessions to drop before `device` gets another one of `num_positions`.

    The device's own are dropped where it has too many; then those of devices over their share, then
    any, least recently used first.

    Raises:
        PoolFullError: too few are idle. Then none is dropped.
    """
    idle = sorted((s for s in sessions if limits.is_idle(s, now)), key=lambda s: s.last_used)
    dropped = _surplus(sessions, idle, device, limits)
    over = devices_over_share(sessions, limits)
    others = [session for session in idle if session not in dropped]
    others.sort(key=lambda s: s.key.device not in over)
    kept = set(sessions).difference(dropped)
    in_use = kept.difference(others)
    if claimed_bytes(in_use, device, num_positions, limits, now) > limits.budget_bytes:
        cache_bytes = limits.cache_bytes(num_positions)
        hidden_bytes = limits.hidden_bytes(num_positions)
        raise PoolFullError(
            f"a session of {num_positions} positions needs {cache_bytes} bytes for its cache and "
            f"{hidden_bytes} for its context; those in use leave too few of {limits.budget_bytes}"
        )
    for session in others:
        if claimed_bytes(kept, device, num_positions, limits, now) <= limits.budget_bytes:
            break
        kept.remove(session)
        dropped.append(session)
    return dropped


def _surplus(
    sessions: Iterable[Session], idle: Iterable[Session], device: str, limits: MemoryLimits
) -> list[Session]:
    """Return the device's idle sessions to drop so that it may have one more."""
    limit = limits.max_sessions_per_device
    num_own = sum(session.key.device == device for session in sessions)
    num_surplus = max(0, num_own + 1 - limit)
    own = [session for session in idle if session.key.device == device]
    if len(own) < num_surplus:
        raise PoolFullError(
            f"device {device} has {limit} sessions in use, which is its limit; close one first"
        )
    return own[:num_surplus]


def claimed_bytes(
    sessions: Collection[Session], device: str, num_positions: int, limits: MemoryLimits, now: float
) -> float:
    """Return the bytes that these sessions and a new one of `device` may claim.

    Another device has no claim beyond its share.
    """
    caches = Counter({device: limits.cache_bytes(num_positions)})
    for session in sessions:
        if not limits.is_idle(session, now):
            caches[session.key.device] += limits.cache_bytes(session.capacity)
    in_use = 0.0
    for name, num_bytes in caches.items():
        in_use += num_bytes if name == device else min(num_bytes, limits.share_bytes)
    # The largest session must still fit when it wakes up, alone.
    largest = max((limits.cache_bytes(s.capacity) for s in sessions), default=0)
    hidden = limits.hidden_bytes(num_positions) + sum(s.store.num_bytes for s in sessions)
    return hidden + max(in_use, largest)


def may_evict(session: Session, other: Session, limits: MemoryLimits, now: float) -> bool:
    """Return whether `session` may have the cache of `other`.

    A job that can be run may evict any cache but that of a job that has waited longer; context that
    only runs ahead may evict those of idle sessions.
    """
    if session.job is None or session.num_pending == 0:
        return limits.is_idle(other, now)
    if other.job is None or other.num_pending == 0:
        return True
    return other.job.arrived > session.job.arrived


def caches_to_evict(
    candidates: Iterable[Session], num_bytes: int, over_share: Collection[str]
) -> list[Session]:
    """Return the sessions whose caches free `num_bytes`; all that there are where that is not
    enough.

    Caches that no job needs now come first; among them those of the devices over their share; then
    the least recently used.
    """
    victims = []
    for session in sorted(
        candidates, key=lambda s: (s.num_pending > 0, s.key.device not in over_share, s.last_used)
    ):
        if num_bytes <= 0:
            break
        if session.lease:
            victims.append(session)
            num_bytes -= session.lease.num_bytes
    return victims


def devices_over_share(
    sessions: Iterable[Session], limits: MemoryLimits, newcomer: Session | None = None
) -> set[str]:
    """Return the devices whose caches exceed their share; a `newcomer` counts as if it had its
    cache.
    """
    used = Counter[str]()
    for session in sessions:
        if session.lease or session is newcomer:
            used[session.key.device] += limits.cache_bytes(session.capacity)
    return {device for device, num_bytes in used.items() if num_bytes > limits.share_bytes}
