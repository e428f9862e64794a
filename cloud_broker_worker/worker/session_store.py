"""All sessions and their memory: admission, caches, eviction, removal."""

from __future__ import annotations

from cloud_broker_worker.worker.config import WorkerConfig
from cloud_broker_worker.worker.eviction_policy import (
    MemoryLimits,
    caches_to_evict,
    devices_over_share,
    may_evict,
    sessions_to_drop,
)
from cloud_broker_worker.worker.kv_pool import KvPool
from cloud_broker_worker.worker.session import Session, SessionKey
from fleet.protocol.messages import Open


class SessionStore:
    """The sessions of a worker. Each keeps its hidden states; it has a cache while it needs one."""

    def __init__(self, pool: KvPool, config: WorkerConfig) -> None:
        self.pool = pool
        self.sessions: dict[SessionKey, Session] = {}
        self.num_evictions = 0
        self._limits = MemoryLimits(
            shape=pool.shape,
            budget_bytes=config.kv_budget_bytes,
            share_bytes=config.max_device_share * config.kv_budget_bytes,
            max_sessions_per_device=config.max_sessions_per_device,
            idle_after_s=config.idle_after_s,
        )

    def can_ever_fit(self, num_positions: int) -> bool:
        """Return whether the whole budget holds a session of that size."""
        limits = self._limits
        needed = limits.cache_bytes(num_positions) + limits.hidden_bytes(num_positions)
        return needed <= limits.budget_bytes

    def admit(self, key: SessionKey, opening: Open, now: float) -> Session:
        """Add a fresh session, in the place of an earlier one of that name.

        Raises:
            PoolFullError: it would need memory that others have a claim to.
        """
        if key in self.sessions:
            self.drop(self.sessions[key])
        num_positions = opening.max_positions
        sessions = self.sessions.values()
        for session in sessions_to_drop(sessions, key.device, num_positions, self._limits, now):
            self.drop(session)
        missing = self._limits.hidden_bytes(num_positions) - self.pool.free_bytes
        over = devices_over_share(self.sessions.values(), self._limits)
        for victim in caches_to_evict(self.sessions.values(), missing, over):
            self.evict(victim)
        store = self.pool.store(num_positions)
        session = Session(
            key=key, opening=opening, store=store, last_used=now, branch=opening.branch
        )
        self.sessions[key] = session
        return session

    def give_cache(self, session: Session, now: float) -> bool:
        """Give the session a cache, if need be in place of others; return whether it has one now.

        Raises:
            PoolFullError: the budget would hold it, but the machine does not.
        """
        if session.lease:
            return True
        limits = self._limits
        sessions = self.sessions.values()
        needed = limits.cache_bytes(session.capacity)
        others = [s for s in sessions if s.lease and may_evict(session, s, limits, now)]
        over = devices_over_share(sessions, limits, session)
        victims = caches_to_evict(others, needed - self.pool.free_bytes, over)
        freed = sum(victim.lease.num_bytes for victim in victims if victim.lease)
        if self.pool.free_bytes + freed < needed:
            return False
        for victim in victims:
            self.evict(victim)
        session.lease = self.pool.lease(session.capacity)
        return True

    def evict(self, session: Session) -> None:
        """Free a session's cache; its hidden states stay."""
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
        """Raise RuntimeError when sessions and memory do not agree; tests call it after every
        scenario.
        """
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
            if key != session.key or not in_order:
                raise RuntimeError(
                    f"session {session.key} as {key}: {session.length} positions have run, "
                    f"{session.received} arrived, {session.capacity} fit"
                )
