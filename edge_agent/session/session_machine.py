"""The state machine of a device's session with a cloud worker. It does no I/O.

It keeps every hidden state in FP16 and decides which message to send next. First it opens the
session. Then it sends verify requests and context. Context is sent in order, and never more than
the worker's window allows. Positions [sent, available) of the :class:`UploadBuffer` are still to be
sent. With `prompt_ids` a worker that accepts them gets token ids in place of the prompt's hidden
states. If a new request needs only one more chunk, both are sent in one message. An `Open` or a
request without a response is sent again, and so are the positions of a window that stays full. A
lost session is opened again.

A session that continues an earlier one is opened at first with the worker that keeps the earlier
one, and with any worker if there is no response to the first `Open`, or a refusal.

The messages `opened` and `gap` name the first position that the worker lacks. The upload continues
from there. This repairs lost messages and lost sessions alike, also when another worker takes over.

Up to `MAX_HELD_POSITIONS` new positions are held back and sent with the next request, in one
message (ADR 0025). While a request is pending, only the positions that its verdict needs are sent.
Later positions would be dropped if the worker rejected a draft.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

import msgspec
from msgspec import UNSET

from edge_agent.answer_tracer import AnswerTracer
from edge_agent.measurements import Measurements
from edge_agent.session.pending_verify import PendingVerify, verify_deadline_ms
from edge_agent.session.upload_buffer import UploadBuffer
from edge_agent.session.worker_directory import is_bundle_served
from fleet.graphs.partition import Float32
from fleet.protocol import topics
from fleet.protocol.answer_trace import TraceEventKind
from fleet.protocol.hidden_states import FLOAT16
from fleet.protocol.messages import (
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
    Verified,
    Verify,
)
from fleet.protocol.report import WorkerStatus
from fleet.protocol.session import LinkEvent, LinkState, advance
from fleet.utils.backoff import backoff_s

log = logging.getLogger(__name__)

# The largest number of unsent positions that wait for the next request. Beyond it, all are sent.
MAX_HELD_POSITIONS: Final = 3
# The largest number of times a message is sent, at equal intervals until its deadline.
NUM_TRIES: Final = 3
# Codes to retry even if `retry_after_ms` is 0, which for all other codes means "never".
RETRIABLE: Final = ("internal", "unknown_session")
LINK_DOWN: Final = "the link to the broker went down"


class OutgoingMessage(NamedTuple):
    topic: str
    body: ToWorker
    qos: int = 0
    request: PendingVerify | None = None  # the request that the message carries


class SessionMachine:
    """The state of one session.

    All times are seconds of one monotonic clock. The caller reads it and passes `now`. `random`
    returns the jitter of the back-off, a number in [0, 1).
    """

    def __init__(
        self,
        opening: Open,
        device: str,
        hidden_size: int,
        measurements: Measurements,
        random: Callable[[], float],
        *,
        upload_dtype: str = FLOAT16,
        prompt_ids: Sequence[int] = (),
        continued_worker: str | None = None,
        tracer: AnswerTracer | None = None,
    ) -> None:
        self.session = opening.session
        self.state = LinkState.IDLE
        self.worker: str | None = None
        self.note: str | None = None
        self.refusal: Refused | None = None  # set when no online worker will accept the session
        self.num_assists = 0
        self.num_verifies = 0
        self._opening = opening
        self._device = device
        self._tracer = tracer
        self._measurements = measurements
        self._random = random
        self._upload_buffer = UploadBuffer(
            opening.max_positions,
            hidden_size,
            upload_dtype,
            has_tokens=opening.choice_rules.need_text,
            prompt_ids=prompt_ids,
        )
        self._request: PendingVerify | None = None
        self._num_requests = 0
        self._is_link_up = False
        self._workers: Mapping[str, WorkerStatus] = {}
        self.worker_epoch: int | None = None
        self._open_at = 0.0
        self._open_until = 0.0
        self._num_losses = 0
        self._num_failed_opens = 0
        self._refused_by: set[str] = set()  # workers that will never accept the session
        self._continued_worker = continued_worker  # the worker of the session to continue
        self._open_directly_at = continued_worker
        self._closings: deque[tuple[str, Close]] = deque()

    # Properties.

    @property
    def is_open(self) -> bool:
        """Whether a worker has the session now."""
        return self.state is LinkState.OPEN

    @property
    def is_closed(self) -> bool:
        return self.state is LinkState.CLOSED

    @property
    def is_available(self) -> bool:
        """Whether a verdict can come soon: the session is open, or it was never lost and can be
        opened. After a loss, the device does not wait for the session to open again.
        """
        if self.state is LinkState.OPEN:
            return True
        if self._num_losses:
            return False
        return self.state is LinkState.OPENING or (self.state is LinkState.IDLE and self._is_served)

    @property
    def has_request(self) -> bool:
        """Whether there is a request whose verdict :meth:`take_response` has not returned yet."""
        return self._request is not None

    @property
    def is_handing_over(self) -> bool:
        """Whether the session is open and its request has not been handed to the network yet."""
        return self.is_open and self._request is not None and not self._request.is_handed_over

    @property
    def is_idle(self) -> bool:
        """Whether the session is open, has no request, and need not send its positions yet."""
        return self.is_open and self._request is None and self._is_held

    @property
    def _is_served(self) -> bool:
        return is_bundle_served(self._workers, self._opening.bundle_id)

    @property
    def _patience_s(self) -> float:
        return self._opening.deadline_ms / 1000 / NUM_TRIES

    # Methods to call while tokens are generated.

    def offer(self, hidden_states: Float32, tokens: Sequence[int] = ()) -> None:
        """Queue the next positions' hidden states [n, hidden] float32 for upload; their tokens [n],
        too, if the session's rules need them.
        """
        self._upload_buffer.add(hidden_states, tokens)

    def rewind(self, num_positions: int) -> None:
        """Drop every position from `num_positions` on and begin the next branch.

        The worker does the same when it rejects a draft. If the device's branch is newer than the
        worker's, the worker drops all positions of the session at the next message.
        """
        self._upload_buffer.rewind(num_positions)

    def ask(
        self,
        start: int,
        draft: Sequence[int],
        trusted: Sequence[int] = (),
        deadline_ms: int | None = None,
        *,
        now: float,
        is_optional: bool = False,
    ) -> None:
        """Ask the worker whether it would choose draft[i] after position `start + i`.

        The worker accepts draft[i] without a check for each index i in `trusted`, the indices of
        the tokens of confident exits. If the session is lost, the request is sent again when the
        session is open again. An optional request is withdrawn when the session is lost or the
        deadline passes. It is not made while the session is unavailable. Without `deadline_ms` the
        deadline of the `Open` applies.
        """
        if is_optional and not self.is_available:
            return
        buffer = self._upload_buffer
        num_pending = max(0, buffer.available - buffer.acknowledged)
        body = Verify(
            session=self.session,
            request=self._next_request(),
            branch=buffer.branch,
            start=start,
            draft=tuple(draft),
            deadline_ms=verify_deadline_ms(deadline_ms or self._opening.deadline_ms, num_pending),
            trusted=tuple(trusted),
        )
        self._request = PendingVerify(body=body)
        if is_optional:
            self._request.abandon_at = now + self._request.deadline_s
            self.num_assists += 1
        else:
            self.num_verifies += 1

    def take_response(self, now: float) -> Verified | None:
        """Return the verdict and forget the request, or return None if there is no verdict yet.

        If there is no verdict at the time `abandon_at`, the request is withdrawn and the session is
        lost.
        """
        request = self._request
        if request is None:
            return None
        if request.response is None:
            if now >= request.abandon_at:
                self._lose_unanswered(request, now)
                self.withdraw()
            return None
        self._request = None
        return request.response

    @property
    def abandon_at(self) -> float:
        """The time at which :meth:`take_response` abandons the request, or infinity."""
        return self._request.abandon_at if self._request else math.inf

    def withdraw(self) -> None:
        """Take back a request without a verdict.

        If the worker has rejected the draft already, the worker's branch number is higher by one.
        The device adds two, so the device's number is higher than any worker's, and each worker
        starts the session again from position 0.
        """
        if self._request:
            self._upload_buffer.branch += 2
        self._request = None

    def abandon(self, note: str) -> None:
        """End the session early: drop the pending request, and send no further requests."""
        self.note = note
        if self._tracer:
            self._tracer.note(TraceEventKind.LOST, note)
        self._request = None
        self.close()

    def close(self) -> None:
        """End the session. The last message due is a `Close` to the worker."""
        if self.is_closed:
            return
        self.state = advance(self.state, LinkEvent.CLOSE)
        if self.worker:
            self._closings.append((self.worker, Close(self.session)))

    def keep(self) -> Continuation | None:
        """End the session so that a later one can continue it. None if no worker has any of it, or
        a request is pending: then only :meth:`close` remains.

        `num_positions` is the number of positions that the worker can have.
        """
        buffer = self._upload_buffer
        num_positions = min(buffer.sent, buffer.available)
        if not self.is_open or self.worker is None or self._request or not num_positions:
            return None
        self.state = advance(self.state, LinkEvent.CLOSE)
        self._closings.append((self.worker, Close(self.session, keep=True)))
        return Continuation(session=self.session, branch=buffer.branch, num_positions=num_positions)

    # Events.

    def observe(self, workers: Mapping[str, WorkerStatus], *, is_link_up: bool) -> None:
        """Record the workers that are online and the state of the link to the broker."""
        self._workers = workers
        self._is_link_up = is_link_up

    def worker_changed(self, worker: str, now: float) -> None:
        """Leave the worker when it has gone or restarted, or drains while another worker serves
        the bundle. Call :meth:`observe` with its new status first.
        """
        if worker != self.worker or not self.is_open:
            return
        status = self._workers.get(worker)
        if status is None or status.epoch != self.worker_epoch:
            self._lose(LinkEvent.WORKER_GONE, f"worker {worker} went away", now)
        elif status.draining and self._is_served:
            self._closings.append((worker, Close(self.session)))  # it waits for its sessions
            self._lose(LinkEvent.WORKER_GONE, f"worker {worker} is stopping", now)

    def publish_failed(self, now: float) -> None:
        """Lose the session, because a message could not be published."""
        self._lose(LinkEvent.TIMEOUT, LINK_DOWN, now)

    def receive(self, message: ToDevice, now: float) -> None:
        """Process one message that a worker has sent in this session."""
        buffer = self._upload_buffer
        match message:
            case Opened():
                self._opened(message)
            case Gap(branch=branch, expected=expected) if branch == buffer.branch:
                buffer.go_back(expected)
            case Received(branch=branch, count=count) if branch == buffer.branch:
                buffer.acknowledge(count)
            case Verified():
                self._verified(message, now)
            case Refused():
                self._refused(message, now)
            case _:
                log.debug("session %s: dropping a message of a different branch", self.session)

    def _opened(self, message: Opened) -> None:
        if self.is_open or self.is_closed:
            if message.worker != self.worker:  # a second worker accepted the session
                self._closings.append((message.worker, Close(self.session)))
            return
        self.state = advance(self.state, LinkEvent.OPENED)
        self.worker = message.worker
        status = self._workers.get(message.worker)
        self.worker_epoch = status.epoch if status else None
        self._num_failed_opens = 0
        self.refusal = None
        self._refused_by.clear()
        self._close_continued(message)
        continues = self._opening.continues
        num_continued = 0 if continues is UNSET else continues.num_positions
        self._upload_buffer.begin(message, num_continued)
        if self._request:
            self._request.renew(self._next_request(), self._upload_buffer.branch)

    def _close_continued(self, opened: Opened) -> None:
        """Close the session to continue, if its worker has not moved it into this one.

        If another worker has opened this one, the first may have done so as well.
        """
        continues = self._opening.continues
        worker = self._continued_worker
        if continues is not UNSET and worker:
            if opened.worker != worker:
                self._closings.append((worker, Close(self.session)))
            if opened.worker != worker or not opened.received:
                self._closings.append((worker, Close(continues.session)))
        self._continued_worker = None
        self._open_directly_at = None

    def _verified(self, message: Verified, now: float) -> None:
        request = self._request
        if request is None or request.response or not request.accepts(message):
            log.debug("session %s: dropping a late verdict: %s", self.session, message)
            return
        request.response = message
        self._upload_buffer.acknowledge(message.start + 1)
        if request.num_sent:  # the round trip counts from the first sending, also after repetitions
            wait_s = now - request.first_sent_at
            self._measurements.round_trip_done(wait_s)
            if message.request == 0 and self._opening.continues is UNSET:
                has_ids = self._upload_buffer.has_sent_ids
                self._measurements.prompt_judged(message.start + 1, wait_s, has_ids=has_ids)

    def _refused(self, message: Refused, now: float) -> None:
        if self.is_open and message.worker not in (None, self.worker):
            return  # the refusal is from a worker that does not have this session
        if message.code == "bundle_mismatch" and self._is_served:
            return  # this worker has a different bundle, and others serve the device's bundle
        if self.state is LinkState.OPENING and self._open_directly_at:
            self._open_directly_at = None
            self._open_at = now  # with any worker
            return
        is_final = message.retry_after_ms == 0 and message.code not in RETRIABLE
        if self.state is LinkState.OPENING and is_final:
            self._refuse_finally(message)
        # When a worker drains, another one may accept the session at once.
        retry_after_s = 0.0 if message.code == "draining" else message.retry_after_ms / 1000
        note = f"the worker refused ({message.code}): {message.message}"
        self._lose(LinkEvent.REFUSED, note, now, retry_after_s)

    def _refuse_finally(self, message: Refused) -> None:
        """Record that this worker will never accept the session. When no other worker is left, the
        refusal is final.
        """
        self._refused_by.add(message.worker or "")
        bundle_id = self._opening.bundle_id
        if message.worker is None or not is_bundle_served(
            self._workers, bundle_id, excluded=self._refused_by
        ):
            self.refusal = message

    # Messages that are due.

    def next_message(self, now: float) -> OutgoingMessage | None:
        """Return the next message that is due, or None.

        This method also loses the session when its opening or its request has timed out, or when
        the link to the broker is down.
        """
        if self._closings:
            return self._to(*self._closings.popleft())
        match self.state:
            case LinkState.IDLE | LinkState.LOST:
                return self._next_open(now)
            case LinkState.OPENING:
                return self._next_repeated_open(now)
            case LinkState.OPEN if self._is_link_up:
                return self._next_context(now) or self._next_request_message(now)
            case LinkState.OPEN:
                self._lose(LinkEvent.TIMEOUT, LINK_DOWN, now)
        return None

    def next_deadline(self, now: float) -> float:
        """Return the time at which to call :meth:`next_message` again if no event comes first.

        Infinity means that only an event can make a message due. Call this method when
        :meth:`next_message` has returned None at `now`.
        """
        match self.state:
            case LinkState.IDLE | LinkState.LOST:
                return self._open_at if now < self._open_at else math.inf
            case LinkState.OPENING:
                return min(self._open_at, self._open_until)
            case LinkState.OPEN:
                return self._next_repetition()
        return math.inf

    def _next_repetition(self) -> float:
        if not self._is_held:
            return self._upload_buffer.retry_at(self._patience_s)
        request = self._request
        if request and request.response is None and request.num_sent:
            return min(request.resend_at, request.first_sent_at + request.deadline_s)
        return math.inf

    def _next_open(self, now: float) -> OutgoingMessage | None:
        if now < self._open_at or not self._is_link_up or not self._is_served:
            return None
        self._open_until = now + self._opening.deadline_ms / 1000
        self.state = advance(self.state, LinkEvent.OPEN)
        return self._open_message(now)

    def _next_repeated_open(self, now: float) -> OutgoingMessage | None:
        if now >= self._open_until:
            self._lose(LinkEvent.TIMEOUT, "no worker accepted the session in time", now)
            return None
        if now < self._open_at:
            return None
        self._open_directly_at = None
        return self._open_message(now)

    def _open_message(self, now: float) -> OutgoingMessage:
        self._open_at = now + self._patience_s
        opening = msgspec.structs.replace(self._opening, branch=self._upload_buffer.branch)
        topic = topics.open_session(self._device)
        if self._open_directly_at:
            topic = topics.to_worker(self._open_directly_at, self._device, self.session)
        return OutgoingMessage(topic, opening, qos=1)

    def _next_context(self, now: float) -> OutgoingMessage | None:
        """Return the next chunk. If it is the last one that a new request needs, return both in one
        message.
        """
        if self._is_held:
            return None
        chunk = self._upload_buffer.next_chunk(now, self._patience_s)
        if chunk is None:
            return None
        if self._request and self._request.num_sent == 0:
            message = self._next_request_message(now, chunk)
            if message:
                return message
        return self._to(self.worker, Context(self.session, chunk))

    @property
    def _is_held(self) -> bool:
        """Whether the unsent positions can wait: the pending request does not need them, or there
        is no pending request and they are few.
        """
        buffer = self._upload_buffer
        request = self._request
        if request and request.response is None:
            return buffer.sent >= request.num_positions
        return buffer.available - buffer.sent <= MAX_HELD_POSITIONS

    def _next_request_message(
        self, now: float, chunk: ContextChunk | None = None
    ) -> OutgoingMessage | None:
        request = self._request
        if request is None or request.response or self._upload_buffer.sent < request.num_positions:
            return None
        if request.num_sent == 0:
            request.first_sent_at = now
        elif now >= request.first_sent_at + request.deadline_s:
            self._lose_unanswered(request, now)
            return None
        elif now < request.resend_at:
            return None
        request.num_sent += 1
        request.resend_at = now + request.deadline_s / NUM_TRIES
        body = msgspec.structs.replace(request.body, chunk=chunk) if chunk else request.body
        return self._to(self.worker, body, request)

    def _next_request(self) -> int:
        """Return a new request number."""
        number = self._num_requests
        self._num_requests += 1
        return number

    # Losses.

    def _lose_unanswered(self, request: PendingVerify, now: float) -> None:
        note = f"no verdict of the cloud came within {request.body.deadline_ms} ms"
        self._lose(LinkEvent.TIMEOUT, note, now)

    def _lose(self, event: LinkEvent, note: str, now: float, retry_after_s: float = 0.0) -> None:
        if self.state not in (LinkState.OPENING, LinkState.OPEN):
            return
        self.note = note
        if self._tracer:
            self._tracer.note(TraceEventKind.LOST, note)
        self._measurements.session_lost()
        is_at_once = event is LinkEvent.WORKER_GONE
        wait_s = 0.0 if is_at_once else backoff_s(self._num_failed_opens, self._random())
        self._open_at = now + max(wait_s, retry_after_s)
        self._num_failed_opens += 1
        self._num_losses += 1
        if self._request and self._request.response is None and self.abandon_at < math.inf:
            self.withdraw()
        self.state = advance(self.state, event)

    def _to(
        self, worker: str | None, body: ToWorker, request: PendingVerify | None = None
    ) -> OutgoingMessage:
        topic = topics.to_worker(worker or "", self._device, body.session)
        return OutgoingMessage(topic, body, request=request)
