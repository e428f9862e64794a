"""The worker's logic without any I/O: messages in, answers out, and one step for all sessions together."""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch

from cloud_broker_worker.config import WorkerConfig
from cloud_broker_worker.kv_pool import PoolFullError
from cloud_broker_worker.scheduler import schedule
from cloud_broker_worker.session import Session, SessionKey, empty_hidden_states
from cloud_broker_worker.upper_layers import Chunk, UpperLayers
from fleet.codec import unpack_context
from fleet.errors import DecodeError
from fleet.messages import (
    PROTOCOL,
    Assist,
    Close,
    Context,
    Gap,
    Open,
    Opened,
    Refused,
    Sampling,
    ToDevice,
    Token,
    ToWorker,
)
from fleet.sampling import draw

log = logging.getLogger(__name__)


class Answer(NamedTuple):
    """A message for a session's device."""

    key: SessionKey
    message: ToDevice


class Engine:
    """Sessions and their caches. `now` is a monotonic time in seconds, given by the caller."""

    def __init__(self, layers: UpperLayers, worker: str, config: WorkerConfig) -> None:
        self.pool = layers.new_pool(config.kv_budget_bytes)
        self.sessions: dict[SessionKey, Session] = {}
        self._layers = layers
        self._manifest = layers.manifest
        self._worker = worker
        self._config = config

    def handle(self, device: str, message: ToWorker, now: float) -> list[Answer]:
        """Takes one message of `device`; what is to be answered at once."""
        key = SessionKey(device, message.session)
        if isinstance(message, Open):
            return [Answer(key, self._open(key, message, now))]
        session = self.sessions.get(key)
        if isinstance(message, Close):
            if session:
                self._drop(session)
            return []
        if session is None:
            return [
                Answer(key, self._refused(key, "unknown_session", "this worker has no such session; open it again"))
            ]
        session.last_used = now
        answer = (
            self._context(session, message) if isinstance(message, Context) else self._assist(session, message, now)
        )
        return [Answer(key, answer)] if answer else []

    def _open(self, key: SessionKey, message: Open, now: float) -> ToDevice:
        bundle_id = self._manifest.bundle_id
        if message.protocol != PROTOCOL:
            return self._refused(
                key, "protocol_mismatch", f"expected protocol {PROTOCOL}, got {message.protocol}; update"
            )
        if message.bundle_id != bundle_id:
            text = (
                f"this worker serves bundle {bundle_id}, the device has {message.bundle_id}; use the same on both sides"
            )
            return self._refused(key, "bundle_mismatch", text)
        limit = self._manifest.model.max_positions
        if message.max_positions > limit:
            return self._refused(key, "too_long", f"expected at most {limit} positions, got {message.max_positions}")
        session = self.sessions.get(key)
        if session is None:
            self._evict(key.device, self.pool.num_bytes(message.max_positions))
            try:
                lease = self.pool.lease(message.max_positions)
            except PoolFullError as error:
                return self._refused(key, error.code, str(error), self._config.retry_after_ms)
            hidden_states = empty_hidden_states(message.max_positions, self._manifest.model.hidden_size)
            session = self.sessions[key] = Session(key, message.sampling, lease, hidden_states, now)
        return Opened(key.session, self._worker, session.received, self._config.max_chunk_bytes)

    def _context(self, session: Session, message: Context) -> ToDevice | None:
        try:
            rows = unpack_context(message, self._manifest.model.hidden_size)
        except DecodeError as error:
            log.warning("context of %s dropped: %s", session.key, error)
            return self._gap(session)
        if message.start + message.count > session.lease.capacity:
            return self._refused(
                session.key, "too_long", f"position {message.start + message.count} of at most {session.lease.capacity}"
            )
        return None if session.take(message.start, rows) else self._gap(session)

    def _gap(self, session: Session) -> ToDevice | None:
        """Says once what is missing, until something arrives."""
        if session.gap_reported == session.received:
            return None
        session.gap_reported = session.received
        return Gap(session.key.session, session.received)

    def _assist(self, session: Session, message: Assist, now: float) -> ToDevice | None:
        if message.position < session.lease.length:
            if session.answer and session.answer.position == message.position:
                return Token(
                    message.session, message.request, message.position, session.answer.token_id, session.answer.logprob
                )
            if session.assist is None or session.assist.position != message.position:
                text = f"expected a position from {session.lease.length} on, got {message.position}"
                return self._refused(session.key, "stale", text)
        session.assist, session.assist_expires = message, now + message.deadline_ms / 1000
        return Gap(message.session, session.received) if message.position >= session.received else None

    def has_work(self) -> bool:
        """Whether a step would run anything."""
        return any(session.num_pending for session in self.sessions.values())

    def step(self, now: float) -> list[Answer]:
        """Runs one ragged batch over the pending positions of every session whose assist can be answered."""
        for session in self.sessions.values():
            if session.assist and now > session.assist_expires:
                session.assist = None
        batch = schedule({key: s.num_pending for key, s in self.sessions.items()}, self._config.max_batch_positions)
        if not batch:
            return []
        sessions = [self.sessions[key] for key in batch]
        try:
            logits = self._layers(
                [Chunk(s.lease, s.pending(count)) for s, count in zip(sessions, batch.values(), strict=True)]
            )
        except RuntimeError as error:  # torch's: out of memory, a broken kernel
            log.exception("a batch of %d sessions failed", len(sessions))
            for session in sessions:
                self._drop(session)
            return [
                Answer(s.key, self._refused(s.key, "internal", f"the worker failed: {error}"[:500])) for s in sessions
            ]
        return [
            Answer(s.key, self._answer(s, row)) for s, row in zip(sessions, logits, strict=True) if s.num_pending == 0
        ]

    def _answer(self, session: Session, logits: torch.Tensor) -> Token:
        assist, session.assist = session.assist, None
        if assist is None:
            raise RuntimeError(f"session {session.key} ran without an assist")
        token_id, logprob = choose(logits, assist.position, session.sampling, self._manifest.top_k)
        session.answer = Token(session.key.session, assist.request, assist.position, token_id, logprob)
        return session.answer

    def expire(self, now: float) -> None:
        """Drops sessions that nobody has used for `session_ttl_s`."""
        for session in [s for s in self.sessions.values() if now - s.last_used > self._config.session_ttl_s]:
            self._drop(session)

    def _evict(self, device: str, wanted_bytes: int) -> None:
        """Makes room: the device's own oldest sessions above its share, then the longest idle ones of all."""
        oldest = sorted(self.sessions.values(), key=lambda s: s.last_used)
        own = [s for s in oldest if s.key.device == device]
        for session in own[: max(0, len(own) + 1 - self._config.max_sessions_per_device)]:
            self._drop(session)
        if wanted_bytes > self.pool.budget_bytes:
            return
        for session in [s for s in oldest if s.key in self.sessions and s.assist is None]:
            if self.pool.used_bytes + wanted_bytes <= self.pool.budget_bytes:
                return
            self._drop(session)

    def _drop(self, session: Session) -> None:
        del self.sessions[session.key]
        self.pool.release(session.lease)

    @staticmethod
    def _refused(key: SessionKey, code: str, message: str, retry_after_ms: int = 0) -> Refused:
        return Refused(key.session, code, retry_after_ms, message)


def choose(logits: torch.Tensor, position: int, sampling: Sampling, top_k: int) -> tuple[int, float]:
    """Token id and log-probability at temperature 1, drawn from the best `top_k` of logits [vocab]."""
    logprobs, ids = torch.log_softmax(logits.float(), -1).topk(min(top_k, logits.shape[-1]))
    chosen = draw(logprobs.numpy(), position, sampling)
    return int(ids[chosen]), float(logprobs[chosen])
