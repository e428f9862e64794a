"""All sessions and their memory: admission, caches, eviction, removal."""

from __future__ import annotations

from typing import Final

from msgspec import UNSET

from cloud_broker_worker.worker.config import WorkerConfig
from cloud_broker_worker.worker.eviction_policy import (
    BLOCK,
    MemoryLimits,
    MemoryNeed,
    caches_to_evict,
    devices_over_share,
    grown_size,
    may_evict,
    sessions_to_drop,
    surplus_sessions,
)
from cloud_broker_worker.worker.kv_pool import KvPool
from cloud_broker_worker.worker.session import Session, SessionKey
from fleet.errors import PoolFullError
from fleet.protocol.messages import Open

MAX_CAPACITY_RATIO: Final = 2
"""Largest capacity of a store that a session takes over, in terms of the positions it may have."""


class SessionStore:
    """The sessions of a worker. Each keeps its hidden states; its cache can be evicted."""

    def __init__(self, pool: KvPool, config: WorkerConfig) -> None:
        self.pool = pool
        self.sessions: dict[SessionKey, Session] = {}
        self.num_evictions = 0
        self._limits = MemoryLimits(
            shape=pool.shape,
            budget_bytes=config.kv_budget_bytes,
            max_device_share=config.max_device_share,
            max_sessions_per_device=config.max_sessions_per_device,
            idle_after_s=config.idle_after_s,
        )

    def can_ever_fit(self, num_positions: int, first_layer: int = 0) -> bool:
        """Return whether the whole budget is enough for a session of `num_positions`."""
        return self._session_bytes(num_positions, first_layer) <= self._limits.budget_bytes

    def _session_bytes(self, num_positions: int, first_layer: int) -> int:
        limits = self._limits
        return limits.cache_bytes(num_positions, first_layer) + limits.hidden_bytes(num_positions)

    def admit(
        self,
        key: SessionKey,
        opening: Open,
        now: float,
        *,
        first_layer: int = 0,
        earlier: Session | None = None,
    ) -> Session:
        """Add a new session. It replaces a session with the same key, and the `earlier` one that it
        continues, whose positions it gets as far as it can use them.

        Raises:
            PoolFullError: the session exceeds the whole budget, or needs memory to which other
                sessions have a claim.
        """
        replaced = self.sessions.get(key)
        if replaced and replaced is not earlier:
            self.drop(replaced)
        num_positions = opening.max_positions
        if not self.can_ever_fit(num_positions, first_layer):
            needed = self._session_bytes(num_positions, first_layer)
            budget = self._limits.budget_bytes
            raise PoolFullError(
                f"a session of {num_positions} positions needs {needed} bytes, but the budget is "
                f"{budget}; open a smaller session, or raise the worker's --kv-budget-mb"
            )
        num_reused = num_reusable(earlier, opening, first_layer)
        num_held = earlier.store.capacity if earlier and num_reused else 0
        need = MemoryNeed(key.device, max(num_held, min(BLOCK, num_positions)), first_layer)
        victims = self._admission_victims(need, now, earlier)
        for victim in victims if num_held else ():  # else `hold` does it, when positions arrive
            self.drop(victim)
        session = Session(
            key=key,
            opening=opening,
            store=self.pool.store(),
            last_used=now,
            branch=opening.branch,
            first_layer=first_layer,
        )
        if earlier:
            self._move(earlier, session, num_reused)
        self.sessions[key] = session
        return session

    def _admission_victims(
        self, need: MemoryNeed, now: float, earlier: Session | None
    ) -> list[Session]:
        """Drop the surplus of the device's sessions, and return those to drop for their memory.

        Raises:
            PoolFullError: the device has too many sessions in use, or there is too little memory.
        """
        others = [session for session in self.sessions.values() if session is not earlier]
        surplus = surplus_sessions(others, need.device, self._limits, now)
        for session in surplus:
            self.drop(session)
        left = [session for session in others if session not in surplus]
        return sessions_to_drop(left, need, self._limits, now)

    def _move(self, earlier: Session, session: Session, num_positions: int) -> None:
        """Remove the earlier session. If the new one can begin with any of its positions, it gets
        its memory, too.
        """
        if num_positions:
            session.take(earlier, num_positions)
        self.drop(earlier)

    def hold(self, session: Session, num_positions: int, now: float) -> None:
        """Grow the session's store to `num_positions`.

        Drop other sessions or evict caches if there is too little memory.

        Raises:
            PoolFullError: the session needs memory to which other sessions have a claim.
        """
        store = session.store
        if num_positions <= store.capacity:
            return
        size = grown_size(store.capacity, num_positions, session.capacity)
        others = [other for other in self.sessions.values() if other is not session]
        need = MemoryNeed(session.key.device, size, session.first_layer)
        for victim in sessions_to_drop(others, need, self._limits, now):
            self.drop(victim)
        missing = self._limits.hidden_bytes(size - store.capacity) - self.pool.free_bytes
        over = devices_over_share(self.sessions.values(), session, self._limits, now)
        for victim in caches_to_evict(self.sessions.values(), missing, over):
            self.evict(victim)
        self.pool.grow_store(store, size)

    def give_cache(self, session: Session, now: float) -> bool:
        """Give the session a cache for its context; evict other caches if necessary.

        Return whether the session has a cache now.

        Raises:
            PoolFullError: the cache is within the budget, but the machine lacks the memory.
        """
        lease = session.lease
        if lease and lease.capacity >= session.received:
            return True
        if not self._free_for_cache(session, now):
            return False
        if lease:
            self.pool.grow_lease(lease, session.store.capacity)
        else:
            session.lease = self.pool.lease(session.store.capacity, session.first_layer)
        return True

    def _free_for_cache(self, session: Session, now: float) -> bool:
        """Free memory for the session's cache. If there is too little, free none; return False."""
        limits = self._limits
        sessions = self.sessions.values()
        needed = limits.cache_bytes(session.store.capacity, session.first_layer)
        if session.lease:
            needed -= session.lease.num_bytes
        over = devices_over_share(sessions, session, limits, now)
        others = [
            other
            for other in sessions
            if other is not session and other.lease and may_evict(session, other, over, limits, now)
        ]
        victims = caches_to_evict(others, needed - self.pool.free_bytes, over)
        freed = sum(victim.lease.num_bytes for victim in victims if victim.lease)
        if self.pool.free_bytes + freed < needed:
            return False
        for victim in victims:
            self.evict(victim)
        return True

    def evict(self, session: Session) -> None:
        """Free a session's cache and keep its hidden states."""
        self.num_evictions += session.lease is not None
        self._free_cache(session)

    def _free_cache(self, session: Session) -> None:
        if session.lease:
            self.pool.free_lease(session.lease)
            session.lease = None

    def drop(self, session: Session) -> None:
        """Remove a session and free its memory."""
        self._free_cache(session)
        self.pool.free_store(session.store)
        self.sessions.pop(session.key, None)

    def is_idle(self, session: Session, now: float) -> bool:
        """Return whether the session has not been used lately and has no job."""
        return self._limits.is_idle(session, now)

    def check_integrity(self) -> None:
        """Raise RuntimeError if sessions and memory disagree. Tests call it after each scenario."""
        self.pool.check_integrity()
        sessions = self.sessions.values()
        leases = {session.lease for session in sessions if session.lease}
        stores = {session.store for session in sessions}
        if leases != self.pool.leases or stores != self.pool.stores:
            raise RuntimeError(
                f"{len(sessions)} sessions, {len(self.pool.stores)} stores and "
                f"{len(self.pool.leases)} caches: some belong to no session"
            )
        for key, session in self.sessions.items():
            in_order = 0 <= session.length <= session.received <= session.capacity
            in_order = in_order and session.received <= session.store.capacity
            if key != session.key or not in_order:
                raise RuntimeError(
                    f"session {session.key} as {key}: {session.length} positions have run, "
                    f"{session.received} arrived, {session.capacity} fit"
                )


def num_reusable(earlier: Session | None, opening: Open, first_layer: int) -> int:
    """Return the number of positions of an earlier session with which a new one can begin.

    It is 0 if they are not those that the device means, or if most of the earlier session's memory
    would be of no use to the new one.
    """
    continues = opening.continues
    if earlier is None or continues is UNSET:
        return 0
    is_meant = (
        earlier.opening.epoch == opening.epoch
        and earlier.first_layer == first_layer
        and earlier.branch == continues.branch
        and earlier.job is None
    )
    max_capacity = max(BLOCK, MAX_CAPACITY_RATIO * opening.max_positions)
    if not is_meant or earlier.store.capacity > max_capacity:
        return 0
    count = min(continues.num_positions, earlier.received, opening.max_positions)
    return min(count, len(earlier.tokens)) if opening.choice_rules.need_text else count
