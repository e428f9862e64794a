"""A device's session with a cloud worker: hidden states go up in the background, questions are asked and awaited.

The session keeps every hidden state in FP16. One thread, the keeper, does all that has to be done in time: it opens the
session, sends [sent, available) in order and within the worker's window, sends a question with the last of the context
that it needs, asks again, and opens again what was lost. `opened` and `gap` move `sent` to what the worker has, so
every loss is mended by sending again from there, to the same worker or another.

A few positions that nobody has asked about wait for company: they go with the next question, in one message (ADR 0025).
While a question is out everything behind it waits: those are drafts, and may be rejected with the ones before them.
"""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Final, NamedTuple, Self

import msgspec

from edge_agent.engine.partition import Float32
from edge_agent.measurements import Measurements
from edge_agent.session.pending_verify import PendingVerify
from edge_agent.session.upload_buffer import UploadBuffer
from edge_agent.session.worker_directory import WorkerDirectory
from fleet.errors import LinkError, ProtocolError
from fleet.protocol import topics
from fleet.protocol.codec import decode_to_device, encode
from fleet.protocol.hidden_states import FLOAT16
from fleet.protocol.messages import (
    Close,
    Context,
    Gap,
    Open,
    Opened,
    Received,
    Refused,
    ToWorker,
    Verified,
    Verify,
)
from fleet.protocol.modes import assist_deadline_ms
from fleet.protocol.session import LinkEvent, LinkState, advance
from fleet.transport.base import Transport
from fleet.utils.backoff import backoff_s

log = logging.getLogger(__name__)

LINK_CHECK_S: Final = 0.1
IDLE_CHECK_S: Final = 1.0
CLOSE_TIMEOUT_S: Final = 2.0
HELD_POSITIONS: Final = 3  # more than these go up without a question
HAND_OVER_S: Final = 0.02  # a question has so long to reach the network before other work begins
NUM_TRIES: Final = 3  # what got no answer is sent again, evenly over its deadline
RETRIABLE: Final = ("internal", "unknown_session")  # said without a time, and yet worth another try


class OutgoingMessage(NamedTuple):
    topic: str
    body: ToWorker
    qos: int = 0
    question: PendingVerify | None = None  # the one that it asks


class CloudSession:
    """One session. The generating thread offers and asks, the transport's thread calls `receive`."""

    def __init__(
        self,
        transport: Transport,
        workers: WorkerDirectory,
        opening: Open,
        hidden_size: int,
        measurements: Measurements,
        *,
        upload_dtype: str = FLOAT16,
    ) -> None:
        self.session = opening.session
        self.worker: str | None = None
        self.note: str | None = None
        self.refusal: Refused | None = (
            None  # why no worker takes it, where asking again will not help
        )
        self.num_assists = 0
        self.num_verifies = 0
        self.bytes_up = 0
        self.bytes_down = 0
        self._transport = transport
        self._workers = workers
        self._opening = opening
        self._measurements = measurements
        self._outbox = UploadBuffer(opening.max_positions, hidden_size, upload_dtype)
        self._open_at = 0.0
        self._give_up_at = 0.0
        self._num_losses = 0
        self._num_failed_opens = 0
        self._refused_by: set[str] = set()  # workers that will never take the session
        self._worker_epoch: int | None = None
        self._question: PendingVerify | None = None
        self._num_questions = 0
        self._state = LinkState.IDLE
        self._changed = threading.Condition()  # on a lock that a thread may take twice
        self._thread = threading.Thread(
            target=self._keep, name=f"session-{self.session[:8]}", daemon=True
        )

    def __enter__(self) -> Self:
        """Begins to ask the workers for the session; the answer is not waited for."""
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._changed:
            if self._state is not LinkState.CLOSED:
                self._advance(LinkEvent.CLOSE)
        self._thread.join(CLOSE_TIMEOUT_S)

    # What the generating thread calls.

    @property
    def may_answer(self) -> bool:
        """Whether a question has a chance now: the session is open, or is being opened for the first time."""
        if self._num_losses == 0 and self._state is LinkState.IDLE:
            return self._workers.serves(self._opening.bundle_id)
        return self._state is LinkState.OPEN or (
            self._num_losses == 0 and self._state is LinkState.OPENING
        )

    @property
    def is_open(self) -> bool:
        """Whether a worker has the session now."""
        return self._state is LinkState.OPEN

    def offer(self, hidden_states: Float32) -> None:
        """Queues the next positions' hidden states [n, hidden] float32 for upload; they are kept as FP16."""
        if not len(hidden_states):
            return
        with self._changed:
            self._outbox.add(hidden_states)
            self._changed.notify_all()

    def rewind(self, num_positions: int) -> None:
        """Forgets every position from `num_positions` on and begins the next branch, as the worker has at a rejection.

        Without one, the worker sees a branch that it does not know and takes the session afresh.
        """
        with self._changed:
            self._outbox.rewind(num_positions)
            self._changed.notify_all()

    @property
    def has_question(self) -> bool:
        """Whether a question is out, or its answer has not been taken."""
        return self._question is not None

    def ask(
        self,
        start: int,
        draft: Sequence[int],
        trusted: Sequence[int] = (),
        wait_ms: int | None = None,
        *,
        gives_up: bool = False,
    ) -> None:
        """Asks whether draft[i] follows position `start + i`, for every i that is not `trusted`.

        Returns when the question is on its way. It outlives a lost session; one that `gives_up` does not, nor its
        deadline of `wait_ms` milliseconds, and where nobody may answer there is none.
        """
        with self._changed:
            if gives_up and not self.may_answer:
                return
            wait_ms = self._wait_ms(wait_ms)
            body = Verify(
                session=self.session,
                request=self._num_questions,
                branch=self._outbox.branch,
                start=start,
                draft=tuple(draft),
                deadline_ms=wait_ms,
                trusted=tuple(trusted),
            )
            self._question = PendingVerify(body=body)
            self._num_questions += 1
            if gives_up:
                self._question.give_up_at = time.monotonic() + wait_ms / 1000
                self.num_assists += 1
            else:
                self.num_verifies += 1
            self._changed.notify_all()
        self._let_go()

    def verdict(self, timeout_s: float) -> Verified | None:
        """The answer to the question, if it comes within `timeout_s` seconds."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while (question := self._question) and question.answer is None:
                now = time.monotonic()
                if now >= question.give_up_at:
                    self._lose(
                        LinkEvent.TIMEOUT,
                        f"the cloud did not answer within {question.body.deadline_ms} ms",
                    )
                    self.withdraw()
                    return None
                if now >= deadline or self._state is LinkState.CLOSED or self.refusal:
                    return None
                self._changed.wait(min(deadline - now, question.give_up_at - now, LINK_CHECK_S))
            self._question = None
            return question.answer if question else None

    def withdraw(self) -> None:
        """Takes an unanswered question back.

        A worker may have rejected its draft and be a branch ahead: the device goes to one that no worker can be on, and
        the session is taken afresh.
        """
        with self._changed:
            if self._question:
                self._outbox.branch += 2
            self._question = None

    def _let_go(self) -> None:
        """Returns when the question has gone to the network: a step that began before would keep a core from it."""
        deadline = time.monotonic() + HAND_OVER_S
        with self._changed:
            while self._is_going and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)

    @property
    def _is_going(self) -> bool:
        return self.is_open and self._question is not None and not self._question.has_gone

    @property
    def _patience_s(self) -> float:
        return self._opening.deadline_ms / 1000 / NUM_TRIES

    def _wait_ms(self, wanted: int | None) -> int:
        return assist_deadline_ms(
            wanted or self._opening.deadline_ms, self._outbox.available - self._outbox.acknowledged
        )

    # What other threads report.

    def worker_changed(self, worker: str) -> None:
        """A worker's status changed: when ours is gone or has restarted, or drains and another serves, move on."""
        with self._changed:
            if worker == self.worker and self._state is LinkState.OPEN:
                if self._workers.epoch(worker) != self._worker_epoch:
                    self._lose(LinkEvent.WORKER_GONE, f"worker {worker} went away")
                elif self._workers.is_draining(worker) and self._workers.serves(
                    self._opening.bundle_id
                ):
                    self._lose(LinkEvent.WORKER_GONE, f"worker {worker} is stopping")
            self._changed.notify_all()

    def abandon(self, note: str) -> None:
        """Gives the session up: a question that waits for the cloud ends now, and no other is asked."""
        with self._changed:
            self.note = note
            self._question = None
            if self._state is not LinkState.CLOSED:
                self._advance(LinkEvent.CLOSE)

    def receive(self, payload: bytes) -> None:
        """Takes one message of the worker.

        Raises:
            ProtocolError: it is none, or not for this session.
        """
        message = decode_to_device(payload)
        if message.session != self.session:
            raise ProtocolError(f"expected session {self.session}, got {message.session}")
        with self._changed:
            self.bytes_down += len(payload)
            match message:
                case Opened():
                    self._opened(message)
                case Gap(branch=branch, expected=expected) if branch == self._outbox.branch:
                    self._outbox.go_back(expected)
                case Received(branch=branch, count=count) if branch == self._outbox.branch:
                    self._outbox.acknowledge(count)
                case Verified():
                    self._answered(message)
                case Refused():
                    self._refused(message)
                case _:
                    log.debug("session %s: what belongs to another branch is dropped", self.session)
            self._changed.notify_all()

    def _opened(self, message: Opened) -> None:
        if self._state in (LinkState.OPEN, LinkState.CLOSED):
            if (
                message.worker != self.worker
            ):  # another worker took it too: it may forget the session
                self._publish(OutgoingMessage(self._topic(message.worker), Close(self.session)))
            return
        self._advance(LinkEvent.OPENED)
        self.worker, self._worker_epoch = message.worker, self._workers.epoch(message.worker)
        self._num_failed_opens = 0
        self.refusal = None
        self._refused_by.clear()
        self._outbox.begin(message)
        if self._question:
            self._question.renew(self._num_questions, self._outbox.branch)
            self._num_questions += 1

    def _answered(self, message: Verified) -> None:
        question = self._question
        if question is None or question.answer or not question.is_answered_by(message):
            log.debug(
                "session %s: an answer that nobody waits for is dropped: %s", self.session, message
            )
            return
        question.answer = message
        self._outbox.acknowledge(message.start + 1)
        if question.num_sent:  # asked again or not: so long it took
            self._measurements.round_trip(time.monotonic() - question.asked_at)

    def _refused(self, message: Refused) -> None:
        if self._state is LinkState.OPEN and message.worker not in (None, self.worker):
            return  # another worker would not have taken it
        bundle = self._opening.bundle_id
        if message.code == "bundle_mismatch" and self._workers.serves(bundle):
            return  # one of another bundle, beside those that serve ours
        note = f"the worker refused ({message.code}): {message.message}"
        is_final = message.retry_after_ms == 0 and message.code not in RETRIABLE
        if self._state is LinkState.OPENING and is_final:
            self._refused_by.add(message.worker or "")
            if message.worker is None or not self._workers.serves(bundle, beside=self._refused_by):
                self.refusal = message
        wait_s = (
            0.0 if message.code == "draining" else message.retry_after_ms / 1000
        )  # others may take it now
        self._lose(LinkEvent.REFUSED, note, wait_s)

    # The keeper.

    def _keep(self) -> None:
        """Does what is due until the session ends."""
        while True:
            with self._changed:
                while (
                    message := self._due(now := time.monotonic())
                ) is None and self._state is not LinkState.CLOSED:
                    self._changed.wait(self._until_due(now))
            if message is None:
                break
            if not self._publish(message):  # not under the lock: the next token is being computed
                with self._changed:
                    self._lose(LinkEvent.TIMEOUT, "the link to the broker went down")
            elif message.question:
                self._transport.flush(HAND_OVER_S)
                with self._changed:
                    message.question.has_gone = True
                    self._changed.notify_all()
        if self.worker:
            self._publish(OutgoingMessage(self._topic(self.worker), Close(self.session)))

    def _due(self, now: float) -> OutgoingMessage | None:
        """The next message, if one is due; moves on what has waited too long."""
        match self._state:
            case LinkState.IDLE | LinkState.LOST:
                return self._due_open(now)
            case LinkState.OPENING:
                if now >= self._give_up_at:
                    self._lose(LinkEvent.TIMEOUT, "no worker took the session in time")
                    return None
                return self._again(now) if now >= self._open_at else None
            case LinkState.OPEN:
                if not self._transport.is_up:
                    self._lose(LinkEvent.TIMEOUT, "the link to the broker went down")
                    return None
                return self._due_context(now) or self._due_question(now)
            case _:
                return None

    def _due_open(self, now: float) -> OutgoingMessage | None:
        if (
            now < self._open_at
            or not self._transport.is_up
            or not self._workers.serves(self._opening.bundle_id)
        ):
            return None
        self._give_up_at = now + self._opening.deadline_ms / 1000
        self._advance(LinkEvent.OPEN)
        return self._again(now)

    def _again(self, now: float) -> OutgoingMessage:
        self._open_at = now + self._patience_s
        opening = msgspec.structs.replace(self._opening, branch=self._outbox.branch)
        return OutgoingMessage(topics.open_session(self._transport.name), opening, qos=1)

    def _due_context(self, now: float) -> OutgoingMessage | None:
        """The next chunk; with the question, when it is the last that a new one needs."""
        if self._is_held:
            return None
        chunk = self._outbox.due(now, self._patience_s)
        if chunk is None:
            return None
        question = self._question
        if question and question.num_sent == 0 and (asked := self._due_question(now)):
            return asked._replace(body=msgspec.structs.replace(question.body, chunk=chunk))
        return OutgoingMessage(self._topic(self.worker), Context(self.session, chunk))

    @property
    def _is_held(self) -> bool:
        """Whether what has not been sent is not needed yet: little, or drafts behind those that are being judged."""
        outbox = self._outbox
        question = self._question
        if question and question.answer is None:
            return outbox.sent >= question.num_positions
        return outbox.available - outbox.sent <= HELD_POSITIONS

    def _due_question(self, now: float) -> OutgoingMessage | None:
        question = self._question
        if question is None or question.answer or self._outbox.sent < question.num_positions:
            return None
        if question.num_sent == 0:
            question.asked_at = now
        elif now >= question.asked_at + question.wait_s:
            self._lose(
                LinkEvent.TIMEOUT,
                f"the cloud did not answer within {question.wait_s * 1000:.0f} ms",
            )
            return None
        elif now < question.send_at:
            return None
        question.num_sent += 1
        question.send_at = now + question.wait_s / NUM_TRIES
        return OutgoingMessage(self._topic(self.worker), question.body, question=question)

    def _until_due(self, now: float) -> float:
        """Seconds until something may be due without anybody's saying so."""
        if self._state is LinkState.OPENING:
            return max(0.0, min(self._open_at, self._give_up_at) - now)
        if self._state is LinkState.OPEN and self._question is None and self._is_held:
            return IDLE_CHECK_S
        return LINK_CHECK_S

    def _lose(self, event: LinkEvent, note: str, retry_after_s: float = 0.0) -> None:
        if self._state not in (LinkState.OPENING, LinkState.OPEN):
            return
        self.note = note
        self._measurements.lost()
        wait = (
            0.0
            if event is LinkEvent.WORKER_GONE
            else backoff_s(self._num_failed_opens, random.random())
        )
        self._open_at = time.monotonic() + max(wait, retry_after_s)
        self._num_failed_opens += 1
        self._num_losses += 1
        if (
            self._question
            and self._question.answer is None
            and self._question.give_up_at < math.inf
        ):
            self.withdraw()
        self._advance(event)

    def _advance(self, event: LinkEvent) -> None:
        self._state = advance(self._state, event)
        self._changed.notify_all()

    def _topic(self, worker: str | None) -> str:
        return topics.to_worker(worker or "", self._transport.name, self.session)

    def _publish(self, message: OutgoingMessage) -> bool:
        payload = encode(message.body)
        try:
            self._transport.publish(message.topic, payload, qos=message.qos)
        except LinkError as error:
            log.debug("session %s: %s", self.session, error)
            return False
        self.bytes_up += len(payload)
        return True
