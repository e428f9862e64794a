"""Sessions that workers keep after an answer, so that the next prompt of the app continues one."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

from edge_agent.engine.prefix_tree import shared_length
from edge_agent.session.worker_directory import WorkerDirectory
from fleet.graphs.partition import Int64
from fleet.protocol import topics
from fleet.protocol.codec import encode
from fleet.protocol.messages import Close, Continuation
from fleet.transport.base import Transport, publish_or_log

MAX_KEPT_SESSIONS: Final = 4
"""Fewer than the sessions that a worker has for one device, since some of those are in use."""


@dataclass(frozen=True, kw_only=True)
class KeptSession:
    """A session of `app` whose answer has ended, at a worker that is in its `worker_epoch`.

    `token_ids` [n] are those of the positions that the worker can have, after `upload_layer`
    layers, on `branch`.
    """

    app: str
    session: str
    worker: str
    worker_epoch: int
    branch: int
    upload_layer: int
    token_ids: Int64


class TakenSession(NamedTuple):
    """A session to continue, of which a prompt shares the first `num_positions` positions."""

    kept: KeptSession
    num_positions: int

    @property
    def continuation(self) -> Continuation:
        """The field of the `Open` that names the session."""
        return Continuation(
            session=self.kept.session,
            branch=self.kept.branch,
            num_positions=self.num_positions,
        )


class KeptSessions:
    """The kept sessions of all apps, the oldest first. Any thread may use them.

    All are of the present `upload_layer`, None if the device uploads nothing. Of more than
    `MAX_KEPT_SESSIONS`, the app with the most gives up its oldest one.
    """

    def __init__(
        self, transport: Transport, workers: WorkerDirectory, upload_layer: int | None
    ) -> None:
        self.upload_layer = upload_layer
        self._transport = transport
        self._workers = workers
        self._lock = threading.Lock()
        self._kept: list[KeptSession] = []

    def is_kept(self, session: str, worker: str) -> bool:
        """Return whether this worker keeps the session."""
        return any(kept.session == session and kept.worker == worker for kept in self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, kept: KeptSession) -> None:
        """Add a session that can be continued."""
        with self._lock:
            self._kept.append(kept)
            surplus = self._surplus()
            if surplus:
                self._kept.remove(surplus)
        if surplus:
            self._forget(surplus)

    def take(self, app: str, token_ids: Sequence[int], upload_layer: int) -> TakenSession | None:
        """Remove and return the app's session with which a prompt shares the most positions.

        The prompt must share at least half of the session's positions, because the rest is lost.
        """
        prompt = np.array(token_ids, np.int64)
        with self._lock:
            shared = [
                TakenSession(kept, shared_length(kept.token_ids, prompt))
                for kept in self._kept
                if kept.app == app and kept.upload_layer == upload_layer and self._is_served(kept)
            ]
            worthwhile = [
                each for each in shared if 2 * each.num_positions >= len(each.kept.token_ids)
            ]
            best = max(worthwhile, key=lambda each: each.num_positions, default=None)
            if best:
                self._kept.remove(best.kept)
            return best

    def worker_changed(self, worker: str) -> None:
        """Forget the sessions of a worker that has gone or restarted."""
        status = self._workers.statuses.get(worker)
        epoch = status.epoch if status else None
        with self._lock:
            self._kept = [
                kept for kept in self._kept if kept.worker != worker or kept.worker_epoch == epoch
            ]

    def move(self, upload_layer: int | None) -> None:
        """Close all sessions, because the device uploads after another layer from now on."""
        self.upload_layer = upload_layer
        self.close()

    def close(self) -> None:
        """Close all sessions."""
        with self._lock:
            kept_sessions = self._kept
            self._kept = []
        for kept in kept_sessions:
            self._forget(kept)

    def _is_served(self, kept: KeptSession) -> bool:
        """Return whether the worker is online, has not restarted, and accepts sessions."""
        status = self._workers.statuses.get(kept.worker)
        return status is not None and status.epoch == kept.worker_epoch and not status.draining

    def _surplus(self) -> KeptSession | None:
        """Return the session that is one too many: the newest if it is of another layer, or the
        oldest of the app with the most sessions.
        """
        if self._kept[-1].upload_layer != self.upload_layer:
            return self._kept[-1]
        if len(self._kept) <= MAX_KEPT_SESSIONS:
            return None
        apps = [kept.app for kept in self._kept]
        return max(self._kept, key=lambda kept: apps.count(kept.app))

    def _forget(self, kept: KeptSession) -> None:
        topic = topics.to_worker(kept.worker, self._transport.name, kept.session)
        publish_or_log(self._transport, topic, encode(Close(kept.session)))
