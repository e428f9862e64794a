"""The choice of the sessions to drop and the caches to evict: plain functions without side effects.

A session claims the memory that is leased for its positions. A session in use (it has a job, or a
message has come lately) claims memory for its hidden states and for its cache. An idle session
claims memory for its hidden states only. A session can begin or grow if its own claims and those
of all other sessions fit into the budget; the claims of another device count only up to its share.
So the caches of all sessions in use fit at the same time. A cache is evicted when an idle session
wakes up, and jobs do not evict each other's caches in turn. A device within its share always finds
room, because sessions of devices over their share are dropped for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from cloud_broker_worker.worker.kv_pool import KvShape
from cloud_broker_worker.worker.session import Session
from fleet.errors import PoolFullError

BLOCK: Final = 64
"""Number of positions in a block; memory is leased in whole blocks."""


@dataclass(frozen=True, kw_only=True)
class MemoryLimits:
    """The byte budget of all sessions, the largest share of it that one device may use, and the
    largest number of sessions that one device may have.

    A session is idle when it has no job and has not been used for `idle_after_s` seconds. A kept
    session is idle at once.
    """

    shape: KvShape
    budget_bytes: int
    max_device_share: float
    max_sessions_per_device: int
    idle_after_s: float

    def cache_bytes(self, num_positions: int, first_layer: int = 0) -> int:
        return num_positions * self.shape.without(first_layer).cache_bytes

    def hidden_bytes(self, num_positions: int) -> int:
        return num_positions * self.shape.hidden_bytes

    def is_idle(self, session: Session, now: float) -> bool:
        has_rested = session.is_kept or session.last_used <= now - self.idle_after_s
        return session.job is None and has_rested

    def share_bytes(self, sessions: Iterable[Session], device: str, now: float) -> float:
        """Return the number of bytes that one device may use while others need memory.

        This is an equal share of the budget, and at most `max_device_share` of it. The budget is
        divided by the number of devices with a session in use; `device` always counts as one.
        """
        in_use = {session.key.device for session in sessions if not self.is_idle(session, now)}
        return self.budget_bytes * min(self.max_device_share, 1 / len(in_use | {device}))


class MemoryNeed(NamedTuple):
    """The memory that a session of `device` needs: `num_positions` positions in the layers from
    `first_layer` on.
    """

    device: str
    num_positions: int
    first_layer: int = 0


@dataclass(frozen=True, kw_only=True)
class Claims:
    """The bytes that sessions claim: by device, for all hidden states, and for the largest cache.

    `share` is the number of bytes in one device's share.
    """

    by_device: Mapping[str, int]
    share: float
    hidden_bytes: int
    largest_bytes: int

    def fit(self, device: str, limits: MemoryLimits) -> bool:
        """Return whether all claims fit. Claims of other devices count only up to their share."""
        claims = self.by_device.items()
        claimed = sum(n if name == device else min(n, self.share) for name, n in claims)
        # The largest cache must fit next to all hidden states, so that its session can wake up.
        alone = self.hidden_bytes + self.largest_bytes
        return max(claimed, alone) <= limits.budget_bytes


def grown_size(num_held: int, num_needed: int, limit: int) -> int:
    """Return the number of positions to lease memory for when `num_needed` are needed.

    The number grows by at least a quarter, but never beyond `limit`, so that the stored hidden
    states are seldom copied into a larger buffer.
    """
    size = max(num_needed, num_held + num_held // 4)
    return min(limit, -(-size // BLOCK) * BLOCK)


def sessions_to_drop(
    sessions: Collection[Session], need: MemoryNeed, limits: MemoryLimits, now: float
) -> list[Session]:
    """Return the sessions to drop, in order, to make room for `need`.

    1. idle sessions of devices over their share
    2. the other idle sessions
    3. if the device that needs memory is within its share: sessions in use whose device is over
       its share

    Within each group, kept sessions come first, and then the least recently used one.

    Raises:
        PoolFullError: dropping all of these would not make enough room. The caller then drops none.
    """
    kept = {session for session in sessions if session.store.capacity}
    dropped = []
    while not (claims := claims_of(kept, need, limits, now)).fit(need.device, limits):
        over = over_share(claims.by_device, claims.share)
        victim = _next_victim(kept, need.device, over, limits, now)
        if victim is None:
            raise PoolFullError(_too_few(need, limits))
        kept.remove(victim)
        dropped.append(victim)
    return dropped


def _next_victim(
    kept: Collection[Session],
    device: str,
    over: Collection[str],
    limits: MemoryLimits,
    now: float,
) -> Session | None:
    idle = [session for session in kept if limits.is_idle(session, now)]
    if idle:
        return min(idle, key=lambda s: (s.key.device not in over, not s.is_kept, s.last_used))
    if device in over:
        return None
    in_use = [session for session in kept if session.key.device in over]
    return min(in_use, key=lambda s: s.last_used, default=None)


def _too_few(need: MemoryNeed, limits: MemoryLimits) -> str:
    cache_bytes = limits.cache_bytes(need.num_positions, need.first_layer)
    hidden_bytes = limits.hidden_bytes(need.num_positions)
    return (
        f"{need.num_positions} positions of a session need {cache_bytes} bytes for their cache and "
        f"{hidden_bytes} for their hidden states; sessions in use leave too few of the "
        f"{limits.budget_bytes} bytes, so try later"
    )


def surplus_sessions(
    sessions: Iterable[Session], device: str, limits: MemoryLimits, now: float
) -> list[Session]:
    """Return the device's idle sessions to drop before it may open one more: empty ones first, then
    kept ones.

    Raises:
        PoolFullError: too few of its sessions are idle.
    """
    limit = limits.max_sessions_per_device
    own = [session for session in sessions if session.key.device == device]
    idle = [session for session in own if limits.is_idle(session, now)]
    num_surplus = max(0, len(own) + 1 - limit)
    if len(idle) < num_surplus:
        raise PoolFullError(
            f"device {device} has {limit} sessions in use, which is its limit; close one first"
        )
    return sorted(idle, key=lambda s: (s.received > 0, not s.is_kept, s.last_used))[:num_surplus]


def claims_of(
    sessions: Collection[Session], need: MemoryNeed, limits: MemoryLimits, now: float
) -> Claims:
    """Return the claims of these sessions and of `need`."""
    largest = limits.cache_bytes(need.num_positions, need.first_layer)
    hidden = limits.hidden_bytes(need.num_positions)
    by_device = Counter({need.device: largest + hidden})
    for session in sessions:
        cache_bytes = limits.cache_bytes(session.store.capacity, session.first_layer)
        hidden += session.store.num_bytes
        largest = max(largest, cache_bytes)
        in_use = 0 if limits.is_idle(session, now) else cache_bytes
        by_device[session.key.device] += session.store.num_bytes + in_use
    share = limits.share_bytes(sessions, need.device, now)
    return Claims(by_device=by_device, share=share, hidden_bytes=hidden, largest_bytes=largest)


def over_share(bytes_by_device: Mapping[str, int], share: float) -> set[str]:
    """Return the devices that exceed their share."""
    return {device for device, num_bytes in bytes_by_device.items() if num_bytes > share}


def may_evict(
    session: Session,
    other: Session,
    over: Collection[str],
    limits: MemoryLimits,
    now: float,
) -> bool:
    """Return whether the cache of `other` may be evicted for `session`.

    The cache of an idle session may always be evicted. If the job of `session` can run, the cache
    of a session in use may be evicted as well, with two exceptions:

    - The device of `session` is over its share, and the device of `other` is not.
    - The job of `other` can run, too, and did not arrive later.
    """
    if limits.is_idle(other, now):
        return True
    if session.job is None or session.num_pending == 0:
        return False
    if session.key.device in over and other.key.device not in over:
        return False
    if other.job is None or other.num_pending == 0:
        return True
    return other.job.arrived > session.job.arrived


def caches_to_evict(
    candidates: Iterable[Session], num_bytes: int, over_share: Collection[str]
) -> list[Session]:
    """Return the sessions whose caches to evict to free `num_bytes`; if all caches together are too
    small, return every candidate that has a cache.

    Caches that no job needs now come before the others. In each of these two groups, the caches of
    devices over their share come first. The least recently used cache of a device comes before its
    other caches.
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
    sessions: Collection[Session], newcomer: Session, limits: MemoryLimits, now: float
) -> set[str]:
    """Return the devices whose caches exceed their share.

    The `newcomer` counts as if it had its cache.
    """
    used = Counter[str]()
    for session in sessions:
        if session.lease or session is newcomer:
            used[session.key.device] += limits.cache_bytes(
                session.store.capacity, session.first_layer
            )
    return over_share(used, limits.share_bytes(sessions, newcomer.key.device, now))
