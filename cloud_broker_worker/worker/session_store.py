"""All sessions and their memory: taken in, given a cache, evicted, dropped."""

from __future__ import annotations

from cloud_broker_worker.worker.config import WorkerConfig
from cloud_broker_worker.worker.eviction_policy import (
    MemoryLimits,
    caches_to_evict,
    devices_over_share,
    may_go_for,
    sessions_to_drop,
)
from cloud_broker_worker.worker.kv_pool import KvPool
from cloud_broker_worker.worker.session import Session, SessionKey
from fleet.protocol.messages import Open


class SessionStore:
    """Every session keeps its hidden states; caches come and go with the need for them."""

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
        """Whether the whole budget holds a session of that size."""
        limits = self._limits
        return (
            limits.cache_bytes(num_positions) + limits.hidden_bytes(num_positions)
            <= limits.budget_bytes
        )

    def admit(self, key: SessionKey, opening: Open, now: float) -> Session:
        """A fresh session, in the place of an earlier one of that name.

        Raises:
            PoolFullError: memory that others have a claim to would have to go.
        """
        if key in self.sessions:
            self.drop(self.sessions[key])
        for session in sessions_to_drop(
            self.sessions.values(), key.device, opening.max_positions, self._limits, now
        ):
            self.drop(session)
        missing = self._limits.hidden_bytes(opening.max_positions) - self.pool.free_bytes
        over = devices_over_share(self.sessions.values(), self._limits)
        for victim in caches_to_evict(self.sessions.values(), missing, over):
            self.evict(victim)
        store = self.pool.store(opening.max_positions)
        session = self.sessions[key] = Session(
            key=key, opening=opening, store=store, last_used=now, branch=opening.branch
        )
        return session

    def give_cache(self, session: Session, now: float) -> bool:
        """Whether the session has a cache now, if need be one that was taken from others.

        Raises:
            PoolFullError: the budget would hold it, but the machine does not.
        """
        if session.lease:
            return True
        wanted = self._limits.cache_bytes(session.capacity)
        others = [
            s
            for s in self.sessions.values()
            if s.lease and may_go_for(session, s, self._limits, now)
        ]
        over = devices_over_share(self.sessions.values(), self._limits, session)
        victims = caches_to_evict(others, wanted - self.pool.free_bytes, over)
        if self.pool.free_bytes + sum(s.lease.num_bytes for s in victims if s.lease) < wanted:
            return False
        for victim in victims:
            self.evict(victim)
        session.lease = self.pool.lease(session.capacity)
        return True

    def evict(self, session: Session) -> None:
        """Takes a session's cache; its hidden states stay."""
        self.num_evictions += session.lease is not None
        self._take_back(session)

    def _take_back(self, session: Session) -> None:
        if session.lease:
            self.pool.take_back(session.lease)
            session.lease = None

    def drop(self, session: Session) -> None:
        """Forgets a session."""
        self._take_back(session)
        self.pool.drop(session.store)
        self.sessions.pop(session.key, None)

    def is_idle(self, session: Session, now: float) -> bool:
        """Whether nobody has used it lately and no question waits."""
        return self._limits.is_idle(session, now)

    def check_integrity(self) -> None:
        """Raises RuntimeError when sessions and memory do not agree: for tests, after every scenario."""
        self.pool.check_integrity()
        sessions = self.sessions.values()
        if {s.lease for s in sessions if s.lease} != self.pool.leases or {
            s.store for s in sessions
        } != self.pool.stores:
            raise RuntimeError(
                f"{len(sessions)} sessions, {len(self.pool.stores)} stores and {len(self.pool.leases)} caches: "
                "some belong to nobody"
            )
        for key, session in self.sessions.items():
            if (
                key != session.key
                or not 0 <= session.length <= session.received <= session.capacity
            ):
                raise RuntimeError(
                    f"session {session.key} as {key}: {session.length} positions have run, {session.received} arrived, "
                    f"{session.capacity} fit"
                )
