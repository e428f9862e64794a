"""The thread that drives a :class:`SessionMachine`: clock, lock and transport of one session."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Sequence
from typing import Final, Self

from edge_agent.answer_tracer import AnswerTracer
from edge_agent.measurements import Measurements
from edge_agent.session.session_machine import OutgoingMessage, SessionMachine
from edge_agent.session.worker_directory import WorkerDirectory
from fleet.errors import LinkError, ProtocolError
from fleet.graphs.partition import Float32
from fleet.protocol.codec import decode_to_device, encode
from fleet.protocol.hidden_states import FLOAT16
from fleet.protocol.messages import Continuation, Open, Refused, Verified
from fleet.transport.base import Transport

log = logging.getLogger(__name__)

LINK_CHECK_S: Final = 0.1
IDLE_CHECK_S: Final = 1.0
CLOSE_TIMEOUT_S: Final = 2.0
HAND_OVER_S: Final = 0.02  # longest wait until a request is on the network


class CloudSession:
    """One session with a cloud worker.

    The generating thread calls `offer` and `ask`. The transport's thread calls `receive`. The
    session's own thread publishes the messages that are due.
    """

    def __init__(
        self,
        transport: Transport,
        workers: WorkerDirectory,
        opening: Open,
        hidden_size: int,
        measurements: Measurements,
        *,
        upload_dtype: str = FLOAT16,
        prompt_ids: Sequence[int] = (),
        note: str | None = None,
        continued_worker: str | None = None,
        tracer: AnswerTracer | None = None,
    ) -> None:
        self.session = opening.session
        self.bytes_up = 0
        self.bytes_down = 0
        self._transport = transport
        self._tracer = tracer
        self._workers = workers
        self._machine = SessionMachine(
            opening,
            transport.name,
            hidden_size,
            measurements,
            random.random,
            upload_dtype=upload_dtype,
            prompt_ids=prompt_ids,
            continued_worker=continued_worker,
            tracer=tracer,
        )
        self._machine.note = note
        self._changed = threading.Condition()
        self._thread = threading.Thread(
            target=self._run, name=f"session-{self.session[:8]}", daemon=True
        )
        self._observe()

    def __enter__(self) -> Self:
        """Begin to open the session; do not wait until a worker accepts it."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._machine.close()
            self._changed.notify_all()
        self._thread.join(CLOSE_TIMEOUT_S)

    def keep(self) -> Continuation | None:
        """End the session so that a later one can continue it; see :meth:`SessionMachine.keep`."""
        with self._changed:
            continuation = self._machine.keep()
            self._changed.notify_all()
            return continuation

    # Properties, for any thread.

    @property
    def worker(self) -> str | None:
        """The last worker that accepted the session."""
        return self._machine.worker

    @property
    def worker_epoch(self) -> int | None:
        """The epoch of that worker when it accepted the session."""
        return self._machine.worker_epoch

    @property
    def note(self) -> str | None:
        """The reason for the latest loss of the session."""
        return self._machine.note

    @property
    def refusal(self) -> Refused | None:
        """The final refusal, after which no worker can accept the session."""
        return self._machine.refusal

    @property
    def num_assists(self) -> int:
        """Number of optional verify requests."""
        return self._machine.num_assists

    @property
    def num_verifies(self) -> int:
        """Number of verify requests that were not optional."""
        return self._machine.num_verifies

    @property
    def is_open(self) -> bool:
        """Whether a worker has the session now."""
        return self._machine.is_open

    @property
    def is_available(self) -> bool:
        """Whether a verdict can come soon; see :attr:`SessionMachine.is_available`."""
        return self._machine.is_available

    @property
    def has_request(self) -> bool:
        """Whether there is a request whose verdict :meth:`wait_response` has not returned yet."""
        return self._machine.has_request

    # Calls of the generating thread.

    def offer(self, hidden_states: Float32, tokens: Sequence[int] = ()) -> None:
        """Queue the next positions' hidden states [n, hidden] float32 for upload as FP16, with
        their tokens [n].
        """
        if not len(hidden_states):
            return
        with self._changed:
            self._machine.offer(hidden_states, tokens)
            self._changed.notify_all()

    def rewind(self, num_positions: int) -> None:
        """Drop every position from `num_positions` on; see :meth:`SessionMachine.rewind`."""
        with self._changed:
            self._machine.rewind(num_positions)
            self._changed.notify_all()

    def ask(
        self,
        start: int,
        draft: Sequence[int],
        trusted: Sequence[int] = (),
        deadline_ms: int | None = None,
        *,
        is_optional: bool = False,
    ) -> None:
        """Request a verdict, see :meth:`SessionMachine.ask`; wait until the request is on the
        network.

        The wait is at most `HAND_OVER_S`. Without this wait, the next step of the model would use
        the processor core that the sending thread needs.
        """
        with self._changed:
            now = time.monotonic()
            self._machine.ask(start, draft, trusted, deadline_ms, now=now, is_optional=is_optional)
            self._changed.notify_all()
            hand_over_by = now + HAND_OVER_S
            while self._machine.is_handing_over and now < hand_over_by:
                self._changed.wait(hand_over_by - now)
                now = time.monotonic()

    def wait_response(self, timeout_s: float) -> Verified | None:
        """Return the verdict on the request, or None if none comes within `timeout_s` seconds."""
        machine = self._machine
        now = time.monotonic()
        deadline = now + timeout_s
        with self._changed:
            while True:
                response = machine.take_response(now)
                has_ended = machine.is_closed or machine.refusal or not machine.has_request
                if response or has_ended or now >= deadline:
                    return response
                self._changed.wait(min(deadline, machine.abandon_at) - now)
                now = time.monotonic()

    def withdraw(self) -> None:
        """Take back a request without a verdict; see :meth:`SessionMachine.withdraw`."""
        with self._changed:
            self._machine.withdraw()

    # Events, reported by other threads.

    def worker_changed(self, worker: str) -> None:
        """Continue with another worker if `worker` has the session and cannot keep it."""
        with self._changed:
            self._observe()
            self._machine.worker_changed(worker, time.monotonic())
            self._changed.notify_all()

    def abandon(self, note: str) -> None:
        """End the session early: drop the pending request, and send no further requests."""
        with self._changed:
            self._machine.abandon(note)
            self._changed.notify_all()

    def receive(self, payload: bytes) -> None:
        """Process one message of a worker.

        Raises:
            ProtocolError: the payload is not a valid message, or is of a different session.
        """
        message = decode_to_device(payload)
        if message.session != self.session:
            raise ProtocolError(f"expected session {self.session}, got {message.session}")
        if isinstance(message, Refused) and message.code == "protocol_mismatch":
            self._workers.log_mismatch(message)
        with self._changed:
            self.bytes_down += len(payload)
            if self._tracer:
                self._tracer.message(message, len(payload), time.monotonic())
            self._observe()
            self._machine.receive(message, time.monotonic())
            self._changed.notify_all()
        if self._machine.is_closed:  # the thread may have ended, but a late worker needs a `Close`
            self._run()

    # The session's thread.

    def _run(self) -> None:
        """Publish the messages that are due until the session is closed."""
        while message := self._wait_message():
            if not self._publish(message):  # without the lock, which the generating thread needs
                with self._changed:
                    self._machine.publish_failed(time.monotonic())
                    self._changed.notify_all()
            elif message.request:
                self._transport.flush(HAND_OVER_S)
                with self._changed:
                    message.request.is_handed_over = True
                    self._changed.notify_all()

    def _wait_message(self) -> OutgoingMessage | None:
        """Wait for the next message that is due and return it, or None once the session is
        closed.
        """
        machine = self._machine
        with self._changed:
            while True:
                now = time.monotonic()
                self._observe()
                state = machine.state
                message = machine.next_message(now)
                if machine.state is not state:
                    self._changed.notify_all()
                if message or machine.is_closed:
                    return message
                check_s = IDLE_CHECK_S if machine.is_idle else LINK_CHECK_S
                self._changed.wait(min(check_s, max(0.0, machine.next_deadline(now) - now)))

    def _observe(self) -> None:
        self._machine.observe(self._workers.statuses, is_link_up=self._transport.is_up)

    def _publish(self, message: OutgoingMessage) -> bool:
        """Publish the message; return whether that succeeded."""
        payload = encode(message.body)
        sent_at = time.monotonic()  # its response may arrive before `publish` returns
        try:
            self._transport.publish(message.topic, payload, qos=message.qos)
        except LinkError as error:
            log.debug("session %s: %s", self.session, error)
            return False
        self.bytes_up += len(payload)
        if self._tracer:
            self._tracer.message(message.body, len(payload), sent_at)
        return True
