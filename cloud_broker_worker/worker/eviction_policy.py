"""Whose memory goes for whom: plain functions over sessions, which decide and change nothing.

A session in use (a question waits, or something came lately) has a claim to its cache, an idle one to its hidden states
only. A newcomer is admitted when its own claims fit beside all others: so caches are evicted when idle sessions wake
up, and not by every question in turn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from cloud_broker_worker.worker.kv_pool import KvShape, PoolFullError
from cloud_broker_worker.worker.session import Session


@dataclass(frozen=True, kw_only=True)
class MemoryLimits:
    """Bytes for everything, bytes for one device's caches while others need some, and how many sessions a device has.

    A session is idle when nobody has used it for `idle_after_s` seconds.
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
        return session.question is None and session.last_used <= now - self.idle_after_s


def sessions_to_drop(
    sessions: Collection[Session], device: str, num_positions: int, limits: MemoryLimits, now: float
) -> list[Session]:
    """Idle sessions that have to go before `device` gets another one of `num_positions`.

    The device's own go where it has too many; then those of devices over their share, then anybody's, least recently
    used first.

    Raises:
        PoolFullError: too few are idle. Then none has to go.
    """
    idle = sorted((s for s in sessions if limits.is_idle(s, now)), key=lambda s: s.last_used)
    limit = limits.max_sessions_per_device
    surplus = max(0, sum(s.key.device == device for s in sessions) + 1 - limit)
    dropped = [s for s in idle if s.key.device == device][:surplus]
    if len(dropped) < surplus:
        raise PoolFullError(
            f"device {device} has {limit} sessions in use, which is its limit; close one first"
        )
    over = devices_over_share(sessions, limits)
    others = sorted((s for s in idle if s not in dropped), key=lambda s: s.key.device not in over)
    kept = set(sessions).difference(dropped)
    if (
        claimed_bytes(kept.difference(others), device, num_positions, limits, now)
        > limits.budget_bytes
    ):
        raise PoolFullError(
            f"a session of {num_positions} positions needs {limits.cache_bytes(num_positions)} bytes for its cache and "
            f"{limits.hidden_bytes(num_positions)} for its context; those in use leave too few of {limits.budget_bytes}"
        )
    for session in others:
        if claimed_bytes(kept, device, num_positions, limits, now) <= limits.budget_bytes:
            break
        kept.remove(session)
        dropped.append(session)
    return dropped


def claimed_bytes(
    sessions: Collection[Session], device: str, num_positions: int, limits: MemoryLimits, now: float
) -> float:
    """Bytes that these sessions may claim beside a new one of `device`; others have no claim beyond their share."""
    caches = Counter({device: limits.cache_bytes(num_positions)})
    for session in sessions:
        if not limits.is_idle(session, now):
            caches[session.key.device] += limits.cache_bytes(session.capacity)
    in_use = sum(n if name == device else min(n, limits.share_bytes) for name, n in caches.items())
    largest = max(
        (limits.cache_bytes(s.capacity) for s in sessions), default=0
    )  # an idle one must still fit, alone
    hidden = limits.hidden_bytes(num_positions) + sum(s.store.num_bytes for s in sessions)
    return hidden + max(in_use, largest)


def may_go_for(session: Session, other: Session, limits: MemoryLimits, now: float) -> bool:
    """Whether `other` may lose its cache to `session`: to a question that can be answered unless its own has waited
    longer, and to context that only runs ahead when it is idle."""
    if session.question is None or session.num_pending == 0:
        return limits.is_idle(other, now)
    return (
        other.question is None
        or other.num_pending == 0
        or other.question.arrived > session.question.arrived
    )


def caches_to_evict(
    candidates: Iterable[Session], num_bytes: int, over_share: Collection[str]
) -> list[Session]:
    """Whose caches make `num_bytes` free; all that there are where that is not enough.

    Those go first that no question needs now; among them those of the devices over their share; then the least recently
    used.
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
    """Devices whose caches take more than their share; with a `newcomer`, as if it had its cache already."""
    used = Counter[str]()
    for session in sessions:
        if session.lease or session is newcomer:
            used[session.key.device] += limits.cache_bytes(session.capacity)
    return {device for device, num_bytes in used.items() if num_bytes > limits.share_bytes}
