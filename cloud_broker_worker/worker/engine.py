"""The worker's logic without any I/O: messages in, answers out, and one step for all sessions together."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import msgspec

from cloud_broker_worker.worker.config import WorkerConfig
from cloud_broker_worker.worker.counters import WorkerCounters
from cloud_broker_worker.worker.kv_pool import PoolFullError
from cloud_broker_worker.worker.scheduler import schedule
from cloud_broker_worker.worker.session import Session, SessionKey
from cloud_broker_worker.worker.session_store import SessionStore
from cloud_broker_worker.worker.upper_layers import Chunk, UpperLayers
from cloud_broker_worker.worker.verification import (
    TokenCandidates,
    answer_of,
    best_candidates,
    make_choices,
    num_candidates,
    repeats,
)
from fleet.errors import DecodeError
from fleet.protocol.codec import unpack_chunk
from fleet.protocol.hidden_states import CONTEXT_DTYPES
from fleet.protocol.messages import (
    PROTOCOL,
    Assist,
    Close,
    Context,
    ContextChunk,
    Gap,
    Open,
    Opened,
    Received,
    Refused,
    ToDevice,
    ToWorker,
    Verified,
    Verify,
)
from fleet.utils.rate_limited_log import RateLimitedLog

log = logging.getLogger(__name__)


class EngineResponse(NamedTuple):
    """A message for a session's device."""

    key: SessionKey
    message: ToDevice


class Engine:
    """Sessions and what is asked of them. `clock` gives monotonic seconds; arrivals are times of the same clock."""

    def __init__(
        self,
        layers: UpperLayers,
        worker: str,
        config: WorkerConfig,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.pool = layers.new_pool(config.kv_budget_bytes)
        self.memory = SessionStore(self.pool, config)
        self.sessions = self.memory.sessions
        self.tally = WorkerCounters()
        self.is_draining = False
        self.denied: frozenset[str] = frozenset()  # devices that are served no more
        self._layers = layers
        self._manifest = layers.manifest
        self._worker = worker
        self._config = config
        self._clock = clock
        self._answers: list[EngineResponse] = []
        self._log = RateLimitedLog(log)

    # Messages.

    def handle(self, device: str, message: ToWorker, arrived: float) -> list[EngineResponse]:
        """Takes one message of `device`; what is to be answered at once."""
        key = SessionKey(device, message.session)
        if isinstance(message, Open):
            answers = [self._open(key, message, arrived)]
        elif session := self.sessions.get(key):
            session.last_used = arrived
            answers = self._take(session, message, arrived)
        elif isinstance(message, Close):
            answers = []
        else:
            answers = [
                self._refused(
                    key, "unknown_session", "this worker has no such session; open it again"
                )
            ]
        return [EngineResponse(key, answer) for answer in answers if answer]

    def _take(
        self, session: Session, message: Context | Assist | Verify | Close, arrived: float
    ) -> list[ToDevice | None]:
        if isinstance(message, Context):
            return [self._store(session, message.chunk)]
        if isinstance(message, Close):
            self.memory.drop(session)
            return []
        if message.chunk is None:
            return [self._ask(session, message, arrived)]
        of_chunk = self._store(session, message.chunk)
        of_question = self._ask(session, msgspec.structs.replace(message, chunk=None), arrived)
        return [of_chunk] if of_chunk == of_question else [of_chunk, of_question]

    def _open(self, key: SessionKey, message: Open, arrived: float) -> ToDevice | None:
        session = self.sessions.get(key)
        if session and message.epoch < session.opening.epoch:
            return None  # late, from before the device started again
        if (
            session is None
            or not same_terms(session.opening, message)
            or session.branch != message.branch
        ):
            if refused := self._why_not(key, message):
                return refused
            try:
                session = self.memory.admit(key, message, arrived)
            except PoolFullError as error:
                can_ever_fit = self.memory.can_ever_fit(message.max_positions)
                return self._refused(
                    key, error.code, str(error), self._config.retry_after_ms if can_ever_fit else 0
                )
        session.last_used = arrived
        session.last_request = -1
        config = self._config
        return Opened(
            session=key.session,
            worker=self._worker,
            received=session.received,
            max_chunk_bytes=config.max_chunk_bytes,
            window_bytes=config.window_bytes,
            dtypes=CONTEXT_DTYPES,
        )

    def _why_not(self, key: SessionKey, message: Open) -> Refused | None:
        """What keeps a session from being served here, whatever memory there is."""
        bundle_id = self._manifest.bundle_id
        limit = self._manifest.model.max_positions
        if key.device in self.denied:
            return self._revoked(key)
        if message.protocol != PROTOCOL:
            text = f"expected protocol {PROTOCOL}, got {message.protocol}; update"
            return self._refused(key, "protocol_mismatch", text)
        if message.bundle_id != bundle_id:
            text = f"this worker serves bundle {bundle_id}, the device has {message.bundle_id}"
            return self._refused(key, "bundle_mismatch", f"{text}; use the same on both sides")
        if message.max_positions > limit:
            return self._refused(
                key, "too_long", f"expected at most {limit} positions, got {message.max_positions}"
            )
        return self._stopping(key) if self.is_draining else None

    def _store(self, session: Session, chunk: ContextChunk) -> ToDevice | None:
        if not session.is_on(chunk.branch):
            return None
        stop = chunk.start + chunk.count
        if stop > session.capacity:
            return self._too_long(session, stop)
        try:
            rows = unpack_chunk(chunk, self._manifest.model.hidden_size)
        except DecodeError as error:
            self._log.warning(
                "context of session %s of %s dropped: %s", *reversed(session.key), error
            )
            return self._gap(session)
        num_new = session.take(chunk.start, rows)
        if num_new is None:
            return self._gap(session)
        num_bytes = len(chunk.data)
        if session.owes_receipt(num_bytes, self._config.window_bytes // 2, is_repeat=num_new == 0):
            return Received(session.key.session, session.branch, session.received)
        return None

    @staticmethod
    def _gap(session: Session) -> ToDevice | None:
        """Says once what is missing, until something arrives."""
        if session.gap_reported == session.received:
            return None
        session.gap_reported = session.received
        return Gap(session.key.session, session.branch, session.received)

    def _ask(self, session: Session, message: Assist | Verify, arrived: float) -> ToDevice | None:
        if repeats(message, session.answer):
            return session.answer
        if message.request < session.last_request:
            return None  # late: the device has asked something else since
        if isinstance(message, Verify) and not session.is_on(message.branch):
            if (
                session.answer
                and message.request > session.answer.request
                and message.branch < session.branch
            ):
                text = (
                    "this session is a branch ahead: its last answer was not heard; open it again"
                )
                return self._refused(session.key, "unknown_session", text)
            return None
        stop = (
            message.start + len(message.draft)
            if isinstance(message, Verify)
            else message.position + 1
        )
        if stop > session.capacity:
            return self._too_long(session, stop)
        session.ask(message, arrived)
        if stop <= session.received:
            return None
        session.gap_reported = None  # who asks about what is not here does not know of the gap
        return self._gap(session)

    # Steps.

    def step(self) -> list[EngineResponse] | None:
        """Runs one ragged batch over positions of many sessions; answers that are ready. None when nothing was to do.

        Questions go first. When none can be answered, context that has arrived runs ahead of the next ones.
        """
        now = self._clock()
        for session in self.sessions.values():
            if session.question and now > session.question.expires:
                self.tally.num_expired += 1
                session.question = None
        if batch := self._for_questions(now) or self._ahead(now):
            self._count(batch, now)
            self._run(batch)
        answers = self._answers
        self._answers = []
        return answers if batch else answers or None

    def _count(self, batch: Mapping[SessionKey, int], now: float) -> None:
        self.tally.num_positions += sum(batch.values())
        for key in batch:
            question = self.sessions[key].question
            if question and not question.has_begun:
                question.has_begun = True
                self.tally.queued.add(now - question.arrived)

    def _for_questions(self, now: float) -> dict[SessionKey, int]:
        waiting = [
            (s.question.arrived, s) for s in self.sessions.values() if s.question and s.num_pending
        ]
        by_age = [session for _, session in sorted(waiting, key=lambda item: item[0])]
        pending = {s.key: s.num_pending for s in self._with_caches(by_age, now)}
        return schedule(pending, self._config.max_batch_positions)

    def _ahead(self, now: float) -> dict[SessionKey, int]:
        """Sessions in use whose context is not a draft: a draft may be rejected, so it runs when it is asked about.

        The newest position waits: a question is about it, and would run it once more for its logits.
        """
        if not self._config.run_ahead_positions:
            return {}
        behind = [
            s
            for s in self.sessions.values()
            if s.length < s.received - 1 and not s.drafts and not self.memory.is_idle(s, now)
        ]
        pending = {s.key: s.received - 1 - s.length for s in self._with_caches(behind, now)}
        return schedule(pending, self._config.run_ahead_positions)

    def _with_caches(self, sessions: Iterable[Session], now: float) -> list[Session]:
        """Those that have a cache now, in this order."""
        ready = []
        for session in sessions:
            try:
                if self.memory.give_cache(session, now):
                    ready.append(session)
            except PoolFullError as error:
                self._give_up(session, error.code, str(error), self._config.retry_after_ms)
        return ready

    def _run(self, batch: Mapping[SessionKey, int]) -> None:
        """Runs so many positions of each session. Where that fails, one by one: only the guilty are given up."""
        sessions = [self.sessions[key] for key in batch]
        self._run_chunks(
            [(session, next_chunk(session, batch[session.key])) for session in sessions]
        )

    def _run_chunks(self, work: Sequence[tuple[Session, Chunk]]) -> None:
        try:
            logits = self._layers([chunk for _, chunk in work])
            samplings = [session.opening.sampling for session, _ in work]
            candidates = best_candidates(logits, num_candidates(samplings, self._manifest.top_k))
        except Exception as error:  # whatever it was
            if len(work) == 1:
                ((session, _),) = work
                log.exception("session %s of %s failed", *reversed(session.key))
                self._give_up(
                    session, "internal", f"the worker failed: {type(error).__name__}: {error}"
                )
                return
            log.warning("a batch of %d sessions failed, they run one by one: %s", len(work), error)
            for one in work:  # the same positions again, though some may be in the cache by now
                self._run_chunks([one])
            return
        first = 0
        for session, chunk in work:
            self._conclude(session, candidates.rows(first, first + len(chunk.outputs)))
            first += len(chunk.outputs)

    def _conclude(self, session: Session, candidates: TokenCandidates) -> None:
        """What follows from the tokens that the worker would choose after the positions that were asked about."""
        question = session.question
        if question is None:
            return
        if not candidates.is_finite.all():
            self._give_up(
                session, "internal", "the worker failed: the upper layers gave no finite logits"
            )
            return
        make_choices(question, candidates, session.opening.sampling)
        if not question.is_decided:
            return
        busy_ms = max(0.0, self._clock() - question.arrived) * 1000
        answer = session.answer = answer_of(question, session.key.session, busy_ms)
        self.tally.answered["verify" if question.draft else "assist"].add(busy_ms / 1000)
        session.question = None
        if isinstance(answer, Verified) and answer.token_id is not None:
            session.rewind(answer.start + answer.accepted + 1, session.branch + 1)
        self._answers.append(EngineResponse(session.key, answer))

    # Ends.

    def expire(self) -> None:
        """Drops sessions that nobody has used for `session_ttl_s`."""
        now = self._clock()
        for session in [
            s for s in self.sessions.values() if now - s.last_used > self._config.session_ttl_s
        ]:
            self.memory.drop(session)

    def deny(self, devices: frozenset[str]) -> list[EngineResponse]:
        """Serves these devices no more, and those that were denied before again; drops their sessions."""
        self.denied = devices
        sessions = [session for session in self.sessions.values() if session.key.device in devices]
        for session in sessions:
            self.memory.drop(session)
        return [EngineResponse(session.key, self._revoked(session.key)) for session in sessions]

    def dismiss(self) -> list[EngineResponse]:
        """Drops every session and sends its device to another worker."""
        sessions = list(self.sessions.values())
        for session in sessions:
            self.memory.drop(session)
        return [EngineResponse(session.key, self._stopping(session.key)) for session in sessions]

    def check_integrity(self) -> None:
        """Raises RuntimeError when sessions and memory do not agree: for tests, after every scenario."""
        self.memory.check_integrity()

    def _give_up(self, session: Session, code: str, reason: str, retry_after_ms: int = 0) -> None:
        self.memory.drop(session)
        self._answers.append(
            EngineResponse(
                session.key, self._refused(session.key, code, reason[:500], retry_after_ms)
            )
        )

    def _stopping(self, key: SessionKey) -> Refused:
        text = "this worker is stopping; open the session with another one"
        return self._refused(key, "draining", text, self._config.retry_after_ms)

    def _revoked(self, key: SessionKey) -> Refused:
        return self._refused(
            key, "revoked", f"{key.device} is suspended, revoked or expired; enroll or resume it"
        )

    def _too_long(self, session: Session, stop: int) -> Refused:
        return self._refused(
            session.key, "too_long", f"position {stop} of at most {session.capacity}"
        )

    def _refused(
        self, key: SessionKey, code: str, message: str, retry_after_ms: int = 0
    ) -> Refused:
        self.tally.refusals[code] += 1
        return Refused(
            session=key.session,
            code=code,
            retry_after_ms=retry_after_ms,
            message=message,
            worker=self._worker,
        )


def same_terms(one: Open, other: Open) -> bool:
    """Whether two openings of a session ask for the same: then the second is the first one sent again."""
    return (one.epoch, one.sampling, one.max_positions) == (
        other.epoch,
        other.sampling,
        other.max_positions,
    )


def next_chunk(session: Session, count: int) -> Chunk:
    """The session's next `count` positions; logits are wanted of those that its question is about."""
    assert session.lease is not None
    start = session.next_position
    stop = start + count
    outputs = session.question.judged(stop) if session.question else []
    return Chunk(session.lease, session.store.rows[start:stop], start, stop, outputs)
