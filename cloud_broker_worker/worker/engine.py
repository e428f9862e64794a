"""The worker's logic without I/O.

`WorkerEngine.handle` processes one message and returns the immediate responses.
`WorkerEngine.step` runs one batch of positions from several sessions, and returns the verdicts that
are ready.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec
from msgspec import UNSET, UnsetType

from cloud_broker_worker.worker.config import WorkerConfig
from cloud_broker_worker.worker.counters import WorkerCounters
from cloud_broker_worker.worker.prompt_queue import PromptQueue
from cloud_broker_worker.worker.scheduler import Pending, position_cost, schedule, shared_units
from cloud_broker_worker.worker.session import Session, SessionKey
from cloud_broker_worker.worker.session_store import SessionStore
from cloud_broker_worker.worker.upper_layers import Chunk, UpperLayers
from cloud_broker_worker.worker.verification import (
    TokenCandidates,
    best_candidates,
    choose_tokens,
    num_candidates,
    repeats,
    verified_response,
)
from fleet.bundles.manifest import Manifest
from fleet.constraints.grammars import Grammars
from fleet.constraints.token_constraint import TokenConstraint
from fleet.errors import ConstraintError, DecodeError, PoolFullError
from fleet.protocol.codec import unpack_chunk, unpack_tokens
from fleet.protocol.hidden_states import CONTEXT_DTYPES, TOKENS, Float16
from fleet.protocol.messages import (
    MIN_PROTOCOL,
    PROTOCOL,
    ChoiceRules,
    Close,
    Context,
    ContextChunk,
    Continuation,
    Gap,
    Open,
    Opened,
    Received,
    Refused,
    ToDevice,
    ToWorker,
    Verify,
)
from fleet.protocol.report import DeviceStatus
from fleet.utils.rate_limited_log import RateLimitedLog

if TYPE_CHECKING:
    from cloud_broker_worker.worker.lower_layers import LowerLayers

log = logging.getLogger(__name__)

BAD_CONSTRAINT: Final = "bad_constraint"
PROMPT_PIECE: Final = 64
"""Positions of a prompt that run through the lower layers at once while one device is served."""
PROMPT_SHARE: Final = 4
"""The caches of prompts in the lower layers may need this part of the memory of all others."""


class EngineResponse(NamedTuple):
    """A message for a session's device."""

    key: SessionKey
    message: ToDevice


class WorkerEngine:
    """Sessions and their verify jobs.

    Without `grammars` the worker refuses sessions with a constraint. With `lower_layers` it accepts
    token ids in place of hidden states.

    `clock` returns monotonic seconds. The parameter `arrived` of the methods is a time of the same
    clock.
    """

    def __init__(
        self,
        layers: UpperLayers,
        worker: str,
        config: WorkerConfig,
        clock: Callable[[], float] = time.monotonic,
        grammars: Grammars | None = None,
        lower_layers: LowerLayers | None = None,
    ) -> None:
        self.pool = layers.new_pool(config.kv_budget_bytes)
        self.session_store = SessionStore(self.pool, config)
        self.sessions = self.session_store.sessions
        self.counters = WorkerCounters()
        self.is_draining = False
        self.denied: frozenset[str] = frozenset()  # devices whose sessions are refused
        self._layers = layers
        self._manifest = layers.manifest
        self._worker = worker
        self._config = config
        self._clock = clock
        self._grammars = grammars
        self._prompts: PromptQueue | None = None
        if lower_layers:
            max_bytes = config.kv_budget_bytes // PROMPT_SHARE
            self._prompts = PromptQueue(self.sessions, lower_layers, max_bytes)
        self._has_run_prompt = False  # in the last step
        self._responses: list[EngineResponse] = []
        self._log = RateLimitedLog(log)

    # Messages.

    def handle(self, device: str, message: ToWorker, arrived: float) -> list[EngineResponse]:
        """Process one message of `device` and return the immediate responses."""
        key = SessionKey(device, message.session)
        if isinstance(message, Open):
            responses = [self._open(key, message, arrived)]
        elif session := self.sessions.get(key):
            session.use(arrived)
            responses = self._handle_in_session(session, message, arrived)
        elif isinstance(message, Close):
            responses = []
        else:
            text = "this worker has no such session; open it again"
            responses = [self._refused(key, "unknown_session", text)]
        return [EngineResponse(key, response) for response in responses if response]

    def _handle_in_session(
        self, session: Session, message: Context | Verify | Close, arrived: float
    ) -> list[ToDevice | None]:
        if isinstance(message, Context):
            return [self._store(session, message.chunk, arrived)]
        if isinstance(message, Close):
            session.keep() if message.keep else self.session_store.drop(session)
            return []
        if message.chunk is None:
            return [self._verify(session, message, arrived)]
        to_chunk = self._store(session, message.chunk, arrived)
        if session.key not in self.sessions:
            return [to_chunk]
        request = msgspec.structs.replace(message, chunk=None)
        to_request = self._verify(session, request, arrived)
        return [to_chunk] if to_chunk == to_request else [to_chunk, to_request]

    def _open(self, key: SessionKey, message: Open, arrived: float) -> ToDevice | None:
        session = self.sessions.get(key)
        if session and message.epoch < session.opening.epoch:
            return None  # late: the device has restarted since it sent this
        is_known = session and same_terms(session.opening, message)
        if session is None or not is_known or session.branch != message.branch:
            admitted = self._refusal(key, message) or self._admit(key, message, arrived)
            if isinstance(admitted, Refused):
                return admitted
            session = admitted
        session.use(arrived)
        session.last_request = -1
        return Opened(
            session=key.session,
            worker=self._worker,
            received=session.received,
            max_chunk_bytes=self._config.max_chunk_bytes,
            window_bytes=self._config.window_bytes,
            dtypes=CONTEXT_DTYPES if self._prompts is None else (*CONTEXT_DTYPES, TOKENS),
        )

    def _admit(self, key: SessionKey, message: Open, now: float) -> Session | Refused:
        """Begin a session, with the positions of an earlier one if it continues that one."""
        store = self.session_store
        first_layer = upload_layer(message, self._manifest) - self._manifest.upload_layer
        earlier = self._continued(key.device, message.continues)
        try:
            constraint = self._constraint(message.choice_rules)
            session = store.admit(key, message, now, first_layer=first_layer, earlier=earlier)
        except ConstraintError as error:
            return self._refused(key, BAD_CONSTRAINT, str(error))
        except PoolFullError as error:
            can_fit = store.can_ever_fit(message.max_positions, first_layer)
            retry_after_ms = self._config.retry_after_ms if can_fit else 0
            return self._refused(key, error.code, str(error), retry_after_ms)
        session.constraint = constraint
        self.counters.num_continued += session.received > 0
        self.counters.num_reused += session.received
        return session

    def _continued(self, device: str, continues: Continuation | UnsetType) -> Session | None:
        """Return the session of the device that a new one continues, if it is here."""
        if continues is UNSET:
            return None
        return self.sessions.get(SessionKey(device, continues.session))

    def _constraint(self, rules: ChoiceRules) -> TokenConstraint | None:
        """Return the constraint of a session, if it has one. Raises ConstraintError."""
        if rules.constraint is None:
            return None
        if self._grammars is None:
            raise ConstraintError("this worker serves no session with a constraint")
        return self._grammars.constrain(rules.constraint, rules.prompt_length)

    def _refusal(self, key: SessionKey, message: Open) -> Refused | None:
        """Return a refusal if this worker cannot serve the session. Memory is not checked here."""
        bundle_id = self._manifest.bundle_id
        limit = self._manifest.model.max_positions
        if key.device in self.denied:
            return self._refused_revoked(key)
        if not MIN_PROTOCOL <= message.protocol <= PROTOCOL:
            return self._refused(key, "protocol_mismatch", protocol_mismatch(message.protocol))
        if message.bundle_id != bundle_id:
            text = f"this worker serves bundle {bundle_id}, the device has {message.bundle_id}"
            return self._refused(key, "bundle_mismatch", f"{text}; use the same on both sides")
        if message.max_positions > limit:
            text = f"expected at most {limit} positions, got {message.max_positions}"
            return self._refused(key, "too_long", text)
        vocab_size = self._manifest.model.vocab_size
        biased = [token_id for token_id, _ in message.choice_rules.logit_bias]
        if max(biased, default=0) >= vocab_size:
            text = f"expected biases of token ids below {vocab_size}, got {max(biased)}"
            return self._refused(key, "unknown_token", f"{text}; correct the bias")
        layer = upload_layer(message, self._manifest)
        if layer not in self._layers.upload_layers:
            layers = " or ".join(map(str, self._layers.upload_layers))
            text = f"this worker continues after layer {layers}, the device uploads after {layer}"
            return self._refused(key, "split_mismatch", f"{text}; use another split or worker")
        return self._refused_draining(key) if self.is_draining else None

    def _store(self, session: Session, chunk: ContextChunk, now: float) -> ToDevice | None:
        if not session.is_on(chunk.branch):
            return None
        stop = chunk.start + chunk.count
        if stop > session.capacity:
            return self._refused_too_long(session, stop)
        try:
            rows, tokens = self._unpack(session, chunk)
        except DecodeError as error:
            device, name = session.key
            self._log.warning("context of session %s of %s dropped: %s", name, device, error)
            return self._gap(session)
        if rows is None and len(session.tokens) < session.received < stop:
            session.rewind(0, session.branch)  # the lower layers run from the first token on
        if chunk.start > session.received:
            return self._gap(session)
        try:
            self.session_store.hold(session, stop, now)
        except PoolFullError as error:
            self.session_store.drop(session)
            return self._refused(session.key, error.code, str(error), self._config.retry_after_ms)
        num_new = session.add_rows(chunk.start, rows, tokens)
        limit_bytes = self._config.window_bytes // 2
        if session.owes_receipt(len(chunk.data), limit_bytes, is_repeat=num_new == 0):
            return Received(session.key.session, session.branch, session.received)
        return None

    def _unpack(
        self, session: Session, chunk: ContextChunk
    ) -> tuple[Float16 | None, Sequence[int]]:
        """Return the rows of a chunk, None if they are to be computed, and its tokens, none if they
        are not needed. Raises DecodeError.
        """
        model = self._manifest.model
        if self._prompts and chunk.dtype == TOKENS:
            return None, unpack_tokens(chunk, model.vocab_size)
        rows = unpack_chunk(chunk, model.hidden_size)
        need_text = session.opening.choice_rules.need_text
        return rows, unpack_tokens(chunk, model.vocab_size) if need_text else ()

    @staticmethod
    def _gap(session: Session) -> ToDevice | None:
        """Return a `Gap` with the first missing position, or None if the last `Gap` named it."""
        if session.gap_reported == session.received:
            return None
        session.gap_reported = session.received
        return Gap(session.key.session, session.branch, session.received)

    def _verify(self, session: Session, message: Verify, arrived: float) -> ToDevice | None:
        response = session.response
        if repeats(message, response):
            return response
        if message.request < session.last_request:
            return None  # late: the device has sent a newer request since
        if not session.is_on(message.branch):
            is_new = response and message.request > response.request
            if is_new and message.branch < session.branch:
                text = "the device missed the last verdict of this session; open the session again"
                return self._refused(session.key, "unknown_session", text)
            return None
        stop = message.start + len(message.draft)
        if stop > session.capacity:
            return self._refused_too_long(session, stop)
        session.add_job(message, arrived)
        if stop <= session.received:
            return None
        # A device that has received the last `Gap` would not send this request yet. So the `Gap`
        # was lost, and is sent again.
        session.gap_reported = None
        return self._gap(session)

    # Steps.

    def step(self) -> list[EngineResponse] | None:
        """Run one ragged batch over positions of many sessions and return the responses that are
        ready, or None when there was nothing to do.

        Verify jobs go first. When no job can run, the step runs context that has arrived, so that
        later jobs find it in the cache. Every second step runs a piece of a prompt through the
        lower layers instead, while one waits.
        """
        now = self._clock()
        for session in self.sessions.values():
            if session.job and now > session.job.expires:
                self.counters.num_expired += 1
                session.job = None
        has_run_prompt = not self._has_run_prompt and self._run_prompt(now)
        has_run = has_run_prompt or self._run_batch(now)
        self._has_run_prompt = has_run_prompt or (not has_run and self._run_prompt(now))
        responses = self._responses
        self._responses = []
        return responses if has_run or self._has_run_prompt else responses or None

    def _run_batch(self, now: float) -> bool:
        """Run a batch of jobs or of context. Return whether there was one."""
        batch = self._batch_of_jobs(now) or self._batch_of_context(now)
        if batch:
            self._count(batch, now)
            self._run(batch)
        return bool(batch)

    def _run_prompt(self, now: float) -> bool:
        """Run a piece of a prompt through the lower layers. Return whether one was waiting."""
        prompts = self._prompts
        session = prompts.next_session() if prompts else None
        if prompts is None or session is None:
            return False
        shared = self._config.max_shared_positions
        try:
            prompts.run(session, shared if self._is_shared(now) else PROMPT_PIECE)
        except Exception as error:  # noqa: BLE001  the other sessions have to be served
            self._fail(session, error)
        return True

    def _count(self, batch: Mapping[SessionKey, int], now: float) -> None:
        self.counters.num_positions += sum(batch.values())
        for key in batch:
            job = self.sessions[key].job
            if job and not job.has_begun:
                job.has_begun = True
                self.counters.queued.add(now - job.arrived)

    def _batch_of_jobs(self, now: float) -> dict[SessionKey, int]:
        waiting = [(s.job.arrived, s) for s in self.sessions.values() if s.job and s.num_pending]
        by_age = [session for _, session in sorted(waiting, key=lambda item: item[0])]
        pending = {
            session.key: Pending(session.num_pending, position_cost(session.next_position))
            for session in self._with_caches(by_age, now)
        }
        return self._schedule(pending, self._config.max_batch_positions, now)

    def _schedule(
        self, pending: Mapping[SessionKey, Pending], max_positions: int, now: float
    ) -> dict[SessionKey, int]:
        """Return the number of positions that each session runs in one step.

        The step is short while several devices are served, because a request that arrives during a
        step has to wait for the end of the step.
        """
        if self._is_shared(now):
            units = shared_units(pending, self._config.max_shared_positions)
            return schedule(pending, min(max_positions, units))
        plain = {key: Pending(each.num_positions) for key, each in pending.items()}
        return schedule(plain, max_positions)

    def _is_shared(self, now: float) -> bool:
        """Return whether several devices are served now."""
        in_use = {
            session.key.device
            for session in self.sessions.values()
            if session.received and not self.session_store.is_idle(session, now)
        }
        return len(in_use) > 1

    def _batch_of_context(self, now: float) -> dict[SessionKey, int]:
        """Choose positions to run before a job needs them.

        Only sessions that are in use and hold no drafts take part. A draft may still be rejected,
        so drafts run only when a job asks for them. The newest position is left out: the next job
        needs logits for it, so it would run twice.
        """
        if not self._config.run_ahead_positions:
            return {}
        behind = [
            session
            for session in self.sessions.values()
            if session.num_ahead
            and not session.holds_drafts
            and not self.session_store.is_idle(session, now)
        ]
        pending = {
            session.key: Pending(session.num_ahead, position_cost(session.length))
            for session in self._with_caches(behind, now)
        }
        return self._schedule(pending, self._config.run_ahead_positions, now)

    def _with_caches(self, sessions: Iterable[Session], now: float) -> list[Session]:
        """Give each session a cache, in the given order, and return the sessions that have one now.

        A session that finds the budget full waits for a later step. A session within the budget is
        abandoned if the machine itself has no memory left.
        """
        ready = []
        for session in sessions:
            try:
                if self.session_store.give_cache(session, now):
                    ready.append(session)
            except PoolFullError as error:
                self._abandon(session, error.code, str(error), self._config.retry_after_ms)
        return ready

    def _run(self, batch: Mapping[SessionKey, int]) -> None:
        """Run the positions of one step. `batch` maps each session to its number of positions."""
        sessions = [self.sessions[key] for key in batch]
        self._run_chunks([(s, next_chunk(s, batch[s.key])) for s in sessions])

    def _run_chunks(self, work: Sequence[tuple[Session, Chunk]]) -> None:
        """Run the chunks as one batch. If the batch fails, run each chunk alone, so that only the
        session that fails is abandoned.
        """
        try:
            logits = self._layers([chunk for _, chunk in work])
            openings = [session.opening for session, _ in work]
            candidates = best_candidates(logits, num_candidates(openings, self._manifest.top_k))
        except Exception as error:  # noqa: BLE001  the other sessions have to be served
            self._run_one_by_one(work, error)
            return
        first = 0
        for session, chunk in work:
            stop = first + len(chunk.outputs)
            self._conclude(session, candidates.rows(first, stop))
            first = stop

    def _run_one_by_one(self, work: Sequence[tuple[Session, Chunk]], error: Exception) -> None:
        """Run each chunk of a failed batch alone. A batch of one chunk is not repeated: its session
        is abandoned.
        """
        if len(work) > 1:
            log.warning("a batch of %d sessions failed, running each alone: %s", len(work), error)
            for item in work:  # safe to repeat: positions in the cache are overwritten
                self._run_chunks([item])
            return
        self._fail(work[0][0], error)

    def _fail(self, session: Session, error: Exception) -> None:
        device, name = session.key
        log.exception("session %s of %s failed", name, device)
        self._abandon(session, "internal", f"the worker failed: {type(error).__name__}: {error}")

    def _conclude(self, session: Session, candidates: TokenCandidates) -> None:
        """Choose tokens from the candidates. When the verdict on the session's job is known, add it
        to the responses.
        """
        job = session.job
        if job is None:
            return
        if not candidates.is_finite.all():
            text = "the worker failed: some logits of the upper layers are not finite"
            self._abandon(session, "internal", text)
            return
        opening = session.opening
        try:
            choose_tokens(job, candidates, opening, session.tokens, session.constraint)
        except ConstraintError as error:
            self._abandon(session, BAD_CONSTRAINT, str(error))
            return
        if not job.is_decided:
            return
        busy_ms = max(0.0, self._clock() - job.arrived) * 1000
        has_top = opening.choice_rules.top_logprobs > 0
        response = verified_response(job, session.key.session, busy_ms, has_top=has_top)
        self.counters.answered.add(busy_ms / 1000)
        session.response = response
        session.job = None
        if response.token_id is not None:
            session.rewind(response.start + response.accepted + 1, session.branch + 1)
        self._responses.append(EngineResponse(session.key, response))

    # Ends.

    def expire(self) -> None:
        """Drop the sessions that have not been used for `session_ttl_s`, and those of devices that
        have been offline for `idle_after_s`.
        """
        now = self._clock()
        oldest = now - self._config.session_ttl_s
        left_before = now - self._config.idle_after_s
        for session in list(self.sessions.values()):
            has_left = session.gone_since is not None and session.gone_since <= left_before
            if has_left or session.last_used < oldest:
                self.session_store.drop(session)

    def observe(self, device: str, status: DeviceStatus) -> None:
        """Stop all work for a device that went offline.

        Its sessions count as unused from now on, so other devices may get the memory of their
        caches. The sessions are dropped unless the device returns soon and uses them, or has kept
        them and was not restarted.
        """
        now = self._clock()
        for session in self.sessions.values():
            if session.key.device != device:
                continue
            if not status.online:
                session.leave(now, now - self._config.idle_after_s)
            elif session.is_kept and session.opening.epoch == status.epoch:
                session.gone_since = None

    def deny(self, devices: frozenset[str]) -> list[EngineResponse]:
        """Set the devices that are refused from now on, and drop their sessions."""
        self.denied = devices
        sessions = [session for session in self.sessions.values() if session.key.device in devices]
        return self._dismiss(sessions, self._refused_revoked)

    def dismiss(self) -> list[EngineResponse]:
        """Drop every session, and ask its device to open it with another worker."""
        return self._dismiss(list(self.sessions.values()), self._refused_draining)

    def _dismiss(
        self, sessions: Sequence[Session], refuse: Callable[[SessionKey], Refused]
    ) -> list[EngineResponse]:
        for session in sessions:
            self.session_store.drop(session)
        return [EngineResponse(session.key, refuse(session.key)) for session in sessions]

    @property
    def num_in_use(self) -> int:
        """Number of sessions that their devices have not ended. Any thread may read it."""
        return sum(not session.is_kept for session in list(self.sessions.values()))

    def check_integrity(self) -> None:
        """Raise RuntimeError if sessions and memory disagree. Tests call it after each scenario."""
        self.session_store.check_integrity()

    def _abandon(self, session: Session, code: str, reason: str, retry_after_ms: int = 0) -> None:
        self.session_store.drop(session)
        refused = self._refused(session.key, code, reason[:500], retry_after_ms)
        self._responses.append(EngineResponse(session.key, refused))

    def _refused_draining(self, key: SessionKey) -> Refused:
        text = "this worker is stopping; open the session with another one"
        return self._refused(key, "draining", text, self._config.retry_after_ms)

    def _refused_revoked(self, key: SessionKey) -> Refused:
        text = f"{key.device} is suspended, revoked or expired; enroll or resume it"
        return self._refused(key, "revoked", text)

    def _refused_too_long(self, session: Session, stop: int) -> Refused:
        text = f"expected at most {session.capacity} positions, got {stop}; open a larger session"
        return self._refused(session.key, "too_long", text)

    def _refused(
        self, key: SessionKey, code: str, message: str, retry_after_ms: int = 0
    ) -> Refused:
        self.counters.refusals[code] += 1
        return Refused(
            session=key.session,
            code=code,
            retry_after_ms=retry_after_ms,
            message=message,
            worker=self._worker,
        )


def protocol_mismatch(protocol: int) -> str:
    """Return the error text for a device with a different protocol: which side to update."""
    older = "device" if protocol < MIN_PROTOCOL else "worker"
    return (
        f"the worker speaks protocols {MIN_PROTOCOL} to {PROTOCOL}, "
        f"the device protocol {protocol}: update the {older}"
    )


def same_terms(one: Open, other: Open) -> bool:
    """Return whether both messages open the same session: same epoch, sampling, rules, size and
    layer.
    """
    return (
        one.epoch == other.epoch
        and one.sampling == other.sampling
        and one.rules == other.rules
        and one.upload_layer == other.upload_layer
        and one.max_positions == other.max_positions
    )


def upload_layer(message: Open, manifest: Manifest) -> int:
    """Return the layer after which the device of a session uploads."""
    return manifest.upload_layer if message.upload_layer is UNSET else message.upload_layer


def next_chunk(session: Session, count: int) -> Chunk:
    """Return the session's next `count` positions as a chunk. Logits are computed only where the
    job still has a token to choose.
    """
    assert session.lease is not None
    start = session.next_position
    stop = start + count
    outputs = session.job.undecided_positions(stop) if session.job else []
    rows = session.store.rows[start:stop]
    return Chunk(session.lease, rows, start, stop, outputs)
