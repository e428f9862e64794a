"""A device's session with a cloud worker: hidden states go up in the background, assists are asked and awaited.

The session keeps every hidden state in FP16. One thread sends [sent, available), in order; `opened` and `gap` move
`sent` to what the worker has, so a loss is mended by sending again from there. An assist goes through the same
thread, after the context that it needs.
"""

from __future__ import annotations

import logging
import threading
import time
from types import TracebackType
from typing import Final, Self

import numpy as np

from edge_agent.partition import Float32
from edge_agent.workers import Workers
from fleet import topics
from fleet.codec import decode_to_device, encode, pack_context
from fleet.errors import LinkError, ProtocolError
from fleet.messages import PROTOCOL, Assist, Close, Gap, Open, Opened, Refused, Sampling, Token, ToWorker
from fleet.policy import assist_deadline_ms
from fleet.session import LinkEvent, LinkState, advance
from fleet.transport import Transport

log = logging.getLogger(__name__)

LINK_CHECK_S: Final = 0.1
CLOSE_TIMEOUT_S: Final = 2.0
NUM_TRIES: Final = 3  # an assist that got no answer is asked again, evenly over its deadline


class Uplink:
    """One session. `offer` and `assist` are called by the generating thread, `receive` by the transport's."""

    def __init__(
        self,
        transport: Transport,
        workers: Workers,
        session: str,
        *,
        epoch: int,
        bundle_id: str,
        sampling: Sampling,
        max_positions: int,
        hidden_size: int,
        deadline_ms: int,
    ) -> None:
        self.session = session
        self.worker: str | None = None
        self.note: str | None = None
        self.num_assists = 0
        self.bytes_up = 0
        self.bytes_down = 0
        self._transport = transport
        self._workers = workers
        self._deadline_ms = deadline_ms
        self._open = Open(session, epoch, bundle_id, PROTOCOL, sampling, max_positions, deadline_ms)
        self._store = np.empty((max_positions, hidden_size), np.float16)
        self._available = 0
        self._sent = 0
        self._answered = 0  # positions that the worker has certainly run
        self._chunk_positions = 1
        self._worker_epoch: int | None = None
        self._assist: Assist | None = None
        self._assist_queued = False
        self._token: Token | None = None
        self._state = LinkState.IDLE
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._upload, name=f"upload-{session[:8]}", daemon=True)

    def __enter__(self) -> Self:
        """Asks the workers to take the session; the answer is not waited for."""
        with self._changed:
            self._advance(LinkEvent.OPEN)
            self._send(topics.open_session(self._transport.name), self._open, qos=1)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._changed:
            self._advance(LinkEvent.CLOSE)
            self._changed.notify_all()
        self._thread.join(CLOSE_TIMEOUT_S)

    def offer(self, hidden_states: Float32) -> None:
        """Queues the next positions' hidden states [n, hidden] float32 for upload; they are kept as FP16."""
        with self._changed:
            end = self._available + len(hidden_states)
            limit = np.finfo(np.float16).max
            self._store[self._available : end] = np.clip(hidden_states, -limit, limit)
            self._available = end
            self._changed.notify_all()

    def assist(self, position: int) -> Token | None:
        """The cloud's token after `position`; None when the session is lost or the deadline passes.

        Once a deadline has passed the session is lost: the rest of the answer does not wait again.
        """
        with self._changed:
            if self._state not in (LinkState.OPENING, LinkState.OPEN):
                return None
            wait_ms = assist_deadline_ms(self._deadline_ms, self._available - self._answered)
            self._assist = Assist(self.session, self.num_assists, position, wait_ms)
            self._assist_queued, self._token = True, None
            self.num_assists += 1
            self._changed.notify_all()
            token = self._await_token(time.monotonic() + wait_ms / 1000, wait_ms / 1000 / NUM_TRIES)
            self._assist, self._assist_queued = None, False
            if token is None and self._state in (LinkState.OPENING, LinkState.OPEN):
                self.note = f"the cloud did not answer within {wait_ms} ms"
                self._advance(LinkEvent.TIMEOUT)
            elif token is not None:
                self._answered = position + 1
            return token

    def _await_token(self, deadline: float, retry_s: float) -> Token | None:
        retry_at = time.monotonic() + retry_s
        while self._token is None and self._state in (LinkState.OPENING, LinkState.OPEN):
            now = time.monotonic()
            if now >= deadline:
                return None
            if not self._transport.is_up:
                self.note = "the link to the broker went down"
                self._advance(LinkEvent.TIMEOUT)
                return None
            if now >= retry_at:
                self._assist_queued, retry_at = True, now + retry_s
                self._changed.notify_all()
            self._changed.wait(min(deadline - now, retry_at - now, LINK_CHECK_S) if retry_at > now else 0)
        return self._token

    def worker_changed(self, worker: str) -> None:
        """A worker's status changed: when it is ours and is gone or has restarted, the session is lost."""
        with self._changed:
            if worker == self.worker and self._workers.epoch(worker) != self._worker_epoch:
                self._lose(LinkEvent.WORKER_GONE, f"worker {worker} went away")

    def abandon(self, note: str) -> None:
        """Gives the session up: an assist that waits for the cloud ends now, and no other is asked."""
        with self._changed:
            self._lose(LinkEvent.TIMEOUT, note)

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
                case Gap(expected=expected):
                    self._sent = min(expected, self._sent)
                case Token(request=request) if self._assist is not None and request == self._assist.request:
                    self._token = message
                case Refused(code=code, message=text):
                    self._lose(LinkEvent.REFUSED, f"the worker refused ({code}): {text}")
                case _:
                    log.debug("session %s: a late answer is dropped", self.session)
            self._changed.notify_all()

    def _opened(self, message: Opened) -> None:
        if self._state is not LinkState.OPENING:
            if message.worker != self.worker:  # another worker took it too: it may forget the session
                self._publish(topics.to_worker(message.worker, self._transport.name, self.session), Close(self.session))
            return
        self._advance(LinkEvent.OPENED)
        self.worker, self._worker_epoch = message.worker, self._workers.epoch(message.worker)
        self._sent = min(message.received, self._available)
        self._chunk_positions = max(1, message.max_chunk_bytes // self._store[0].nbytes)

    def _lose(self, event: LinkEvent, note: str) -> None:
        if self._state in (LinkState.OPENING, LinkState.OPEN):
            self.note = note
            self._advance(event)

    def _advance(self, event: LinkEvent) -> None:
        self._state = advance(self._state, event)
        self._changed.notify_all()

    def _upload(self) -> None:
        """Sends what is due until the session ends."""
        while True:
            with self._changed:
                while not (message := self._due()) and self._state not in (LinkState.LOST, LinkState.CLOSED):
                    self._changed.wait()
            if message is None:
                break
            self._send(self._topic(), message)  # not under the lock: the next token is being computed
        if self.worker:
            self._publish(self._topic(), Close(self.session))

    def _due(self) -> ToWorker | None:
        if self._state is not LinkState.OPEN:
            return None
        if self._sent < self._available:
            start = self._sent
            self._sent = min(self._available, start + self._chunk_positions)
            return pack_context(self.session, start, self._store[start : self._sent])
        if self._assist_queued:
            self._assist_queued = False
            return self._assist
        return None

    def _topic(self) -> str:
        return topics.to_worker(self.worker or "", self._transport.name, self.session)

    def _send(self, topic: str, message: ToWorker, qos: int = 0) -> None:
        if not self._publish(topic, message, qos):
            with self._changed:
                self._lose(LinkEvent.TIMEOUT, "the link to the broker went down")

    def _publish(self, topic: str, message: ToWorker, qos: int = 0) -> bool:
        payload = encode(message)
        try:
            self._transport.publish(topic, payload, qos=qos)
        except LinkError as error:
            log.debug("session %s: %s", self.session, error)
            return False
        self.bytes_up += len(payload)
        return True
