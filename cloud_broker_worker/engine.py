"""The worker's logic without any I/O: messages in, answers out, and one step for all sessions together."""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch

from cloud_broker_worker.config import WorkerConfig
from cloud_broker_worker.kv_pool import PoolFullError
from cloud_broker_worker.log_limit import LimitedLog
from cloud_broker_worker.scheduler import schedule
from cloud_broker_worker.session import Session, SessionKey
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
    """Sessions, least recently used first, and their caches. `now` is a monotonic time in seconds, by the caller."""

    def __init__(self, layers: UpperLayers, worker: str, config: WorkerConfig) -> None:
        self.pool = layers.new_pool(config.kv_budget_bytes)
        self.sessions: dict[SessionKey, Session] = {}
        self._layers = layers
        self._manifest = layers.manifest
        self._worker = worker
        self._config = config
        self._log = LimitedLog(log)

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
        self.sessions[key] = self.sessions.pop(key)
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
        if session is None or not same_terms(session.opening, message):
            try:
                session = self._admit(key, message, now)
            except PoolFullError as error:
                can_ever_fit = self.pool.num_bytes(message.max_positions) <= self.pool.budget_bytes
                return self._refused(key, error.code, str(error), self._config.retry_after_ms if can_ever_fit else 0)
        return Opened(key.session, self._worker, session.received, self._config.max_chunk_bytes)

    def _admit(self, key: SessionKey, message: Open, now: float) -> Session:
        """A fresh session, in the place of an earlier one of that name.

        Raises:
            PoolFullError: neither the budget nor the device's share holds it, and too few sessions are idle.
        """
        if key in self.sessions:
            self._drop(self.sessions[key])
        self._make_room(key.device, self.pool.num_bytes(message.max_positions), now)
        session = self.sessions[key] = Session(key, message, self.pool.lease(message.max_positions), now)
        return session

    def _context(self, session: Session, message: Context) -> ToDevice | None:
        try:
            rows = unpack_context(message, self._manifest.model.hidden_size)
        except DecodeError as error:
            self._log.warning("context of session %s of %s dropped: %s", *reversed(session.key), error)
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
        answer = session.answer
        if answer and (answer.request, answer.position) == (message.request, message.position):
            return answer
        session.assist, session.assist_expires = message, now + message.deadline_ms / 1000
        if message.position < session.received:
            return None
        session.gap_reported = session.received
        return Gap(message.session, session.received)

    def has_work(self) -> bool:
        """Whether a step would run anything."""
        return any(session.num_pending for session in self.sessions.values())

    def step(self, now: float) -> list[Answer]:
        """Runs one ragged batch over the pending positions of every session whose assist can be answered."""
        for session in self.sessions.values():
            if session.assist and now > session.assist_expires:
                session.assist = None
        pending = {key: session.num_pending for key, session in self.sessions.items()}
        batch = schedule(pending, self._config.max_batch_positions)
        if not batch:
            return []
        sessions = [self.sessions[key] for key in batch]
        try:
            logits = self._layers([Chunk(s.lease, s.next_position, s.next_position + batch[s.key]) for s in sessions])
            return [
                Answer(s.key, self._answer(s, row))
                for s, row in zip(sessions, logits, strict=True)
                if batch[s.key] == pending[s.key]
            ]
        except Exception as error:  # whatever it was, only this batch's sessions pay for it
            log.exception("a batch of %d sessions failed", len(sessions))
            return [Answer(s.key, self._fail(s, f"{type(error).__name__}: {error}")) for s in sessions]

    def _answer(self, session: Session, logits: torch.Tensor) -> ToDevice:
        assist, session.assist = session.assist, None
        if assist is None or not logits.isfinite().all():
            return self._fail(session, "the upper layers gave no finite logits")
        token_id, logprob = choose(logits, assist.position, session.opening.sampling, self._manifest.top_k)
        session.answer = Token(session.key.session, assist.request, assist.position, token_id, logprob)
        return session.answer

    def _fail(self, session: Session, reason: str) -> Refused:
        """Gives up a session whose cache cannot be trusted any more."""
        self._drop(session)
        return self._refused(session.key, "internal", f"the worker failed: {reason}"[:500])

    def expire(self, now: float) -> None:
        """Drops sessions that nobody has used for `session_ttl_s`."""
        for session in [s for s in self.sessions.values() if now - s.last_used > self._config.session_ttl_s]:
            self._drop(session)

    def _make_room(self, device: str, num_bytes: int, now: float) -> None:
        """Drops idle sessions, least recently used first: the device's own above its share, then anybody's.

        Raises:
            PoolFullError: the device has its share in use.
        """
        idle = [s for s in self.sessions.values() if s.is_idle(now - self._config.idle_after_s)]
        limit = self._config.max_sessions_per_device
        surplus = sum(key.device == device for key in self.sessions) + 1 - limit
        own = [s for s in idle if s.key.device == device][: max(0, surplus)]
        if len(own) < surplus:
            raise PoolFullError(f"device {device} has {limit} sessions in use, which is its limit; close one first")
        for session in own:
            self._drop(session)
        idle = [s for s in idle if s.key in self.sessions]
        if not self.pool.fits(num_bytes - sum(s.lease.num_bytes for s in idle)):
            return  # the pool says what is missing
        for session in idle:
            if self.pool.fits(num_bytes):
                return
            self._drop(session)

    def _drop(self, session: Session) -> None:
        self.sessions.pop(session.key, None)
        self.pool.release(session.lease)

    @staticmethod
    def _refused(key: SessionKey, code: str, message: str, retry_after_ms: int = 0) -> Refused:
        return Refused(key.session, code, retry_after_ms, message)


def same_terms(one: Open, other: Open) -> bool:
    """Whether two openings of a session ask for the same: then the second is the first one sent again."""
    return (one.epoch, one.sampling, one.max_positions) == (other.epoch, other.sampling, other.max_positions)


def choose(logits: torch.Tensor, position: int, sampling: Sampling, top_k: int) -> tuple[int, float]:
    """Token id and log-probability at temperature 1, drawn from the best `top_k` of logits [vocab]."""
    logprobs, ids = torch.log_softmax(logits.float(), -1).topk(min(top_k, logits.shape[-1]))
    chosen = draw(logprobs.numpy(), position, sampling)
    return int(ids[chosen]), float(logprobs[chosen])
