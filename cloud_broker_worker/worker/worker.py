"""The worker: messages from the broker into the engine, the engine's answers back."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter
from contextlib import suppress
from types import TracebackType
from typing import Final, Self

from cloud_broker_worker.worker.config import WorkerConfig
from cloud_broker_worker.worker.engine import Engine, EngineResponse
from cloud_broker_worker.worker.upper_layers import UpperLayers
from fleet import __version__
from fleet.bundles.manifest import Bundle
from fleet.errors import LinkError, ProtocolError
from fleet.protocol import topics
from fleet.protocol.codec import decode_to_worker, encode
from fleet.protocol.denylist import decode_denylist
from fleet.protocol.messages import Open, ToWorker
from fleet.protocol.report import WorkerStatus, encode_status
from fleet.transport.base import Transport
from fleet.utils.rate_limited_log import RateLimitedLog

log = logging.getLogger(__name__)

EXPIRY_CHECK_S: Final = 1.0
STOP_TIMEOUT_S: Final = 5.0
DRAIN_CHECK_S: Final = 0.1
QUEUE_SHARE: Final = (
    0.25  # of the messages that wait may be one device's, so that none keeps out the others
)


class Worker:
    """Serves one bundle. Use as a context manager; it announces itself and serves until it is closed.

    Its thread takes messages and runs a step in turns; `last_turn` is when it last began one, in monotonic seconds.
    """

    def __init__(self, transport: Transport, bundle: Bundle, config: WorkerConfig) -> None:
        """Raises BundleError when the cloud partition does not load."""
        self.name = transport.name
        self.engine = Engine(
            UpperLayers(bundle, config.num_threads, config.weights), transport.name, config
        )
        self._transport = transport
        self._bundle_id = bundle.manifest.bundle_id
        self._config = config
        self._announced = 0
        self.last_turn = time.monotonic()
        self._epoch = time.time_ns() // 1_000_000
        self._inbox: queue.Queue[tuple[float, str, ToWorker]] = queue.Queue(
            config.max_queued_messages
        )
        self._queued = Counter[str]()  # messages of each device in there
        self._counting = threading.Lock()
        self._denied = self.engine.denied  # as it was heard last; the engine is the thread's alone
        self._thread = threading.Thread(target=self._serve, name=f"worker-{self.name}", daemon=True)
        self._open_filter = (
            topics.shared_open_filter(self._bundle_id)
            if config.shared_opens
            else topics.OPEN_FILTER
        )
        self._stopping = threading.Event()
        self._announcing = threading.Lock()
        self._log = RateLimitedLog(log)

    def __enter__(self) -> Self:
        self._thread.start()
        self._transport.subscribe(topics.REVOKED, self._on_revoked, qos=1, retained=True)
        self._transport.subscribe(f"{topics.PREFIX}/w/{self.name}/+/+", self._on_message)
        self._transport.subscribe(self._open_filter, self._on_message, qos=1)
        self._transport.on_up(self._announce)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stopping.set()
        self._thread.join(STOP_TIMEOUT_S)
        if not self.is_serving:  # else a step still runs, and the devices find out by themselves
            self._send(self.engine.dismiss())
        self._publish(topics.worker_status(self.name), self.will(), qos=1, retain=True)

    def drain(self, hurry: threading.Event) -> None:
        """Takes no more sessions and serves those that it has until they end, at most `drain_timeout_s` seconds.

        Devices that know of another worker leave at once. Setting `hurry` ends the wait.
        """
        self.engine.is_draining = True
        self._transport.unsubscribe(self._open_filter)
        self._announce()
        deadline = time.monotonic() + self._config.drain_timeout_s
        while (
            self.engine.sessions and time.monotonic() < deadline and not hurry.wait(DRAIN_CHECK_S)
        ):
            pass

    @property
    def is_serving(self) -> bool:
        """Whether its thread runs."""
        return self._thread.is_alive()

    @property
    def is_connected(self) -> bool:
        """Whether it can reach the broker now."""
        return self._transport.is_up

    @property
    def num_queued(self) -> int:
        """Messages that have arrived and not been handled."""
        return self._inbox.qsize()

    @staticmethod
    def will() -> bytes:
        """The status payload of a worker that has gone."""
        return encode_status(WorkerStatus(online=False, epoch=0))

    def _announce(self) -> None:
        with self._announcing:  # of two threads the later one must not publish the older status
            self._announced = len(self.engine.sessions)
            status = WorkerStatus(
                online=True,
                epoch=self._epoch,
                bundle_ids=(self._bundle_id,),
                version=__version__,
                num_sessions=self._announced,
                draining=self.engine.is_draining,
            )
            self._publish(
                topics.worker_status(self.name), encode_status(status), qos=1, retain=True
            )

    def _on_message(self, topic: str, payload: bytes) -> None:
        """Decides what a message is and queues it; who sent it says the topic, which the broker has checked."""
        try:
            message = decode_to_worker(payload)
            if isinstance(message, Open):
                (device,) = topics.parse(topic, "open", "+")
            else:
                _, device, session = topics.parse(topic, "w", "+", "+", "+")
                if message.session != session:
                    raise ProtocolError(
                        f"expected session {session} of the topic, got {message.session}"
                    )
        except ProtocolError as error:
            self._log.warning("message on %s dropped: %s", topic, error)
            return
        with self._counting:
            num_own = self._queued[device]
            has_room = num_own < self._inbox.maxsize * QUEUE_SHARE and not self._inbox.full()
            if has_room:
                self._queued[device] = num_own + 1
                self._inbox.put_nowait((time.monotonic(), device, message))
        if not has_room:
            text = "message on %s dropped: %d messages wait already, %d of them its device's"
            self._log.warning(text, topic, self._inbox.qsize(), num_own)

    def _on_revoked(self, topic: str, payload: bytes) -> None:
        """Without such a message nobody is denied; what cannot be read changes nothing."""
        try:
            self._denied = decode_denylist(payload)
        except ProtocolError as error:
            self._log.warning("message on %s dropped: %s", topic, error)

    def _serve(self) -> None:
        next_check = time.monotonic()
        is_idle = True
        while not self._stopping.is_set():
            self.last_turn = time.monotonic()
            try:
                self._deny()
                self._take(wait=is_idle)
                is_idle = True  # also after an error: none is repeated in haste
                answers = self.engine.step()
                is_idle = answers is None
                self._send(answers or [])
                if time.monotonic() > next_check:
                    self.engine.expire()
                    if len(self.engine.sessions) != self._announced:
                        self._announce()
                    next_check = time.monotonic() + EXPIRY_CHECK_S
            except Exception:  # the outermost boundary: one bad session must not end the worker
                log.exception("the worker goes on after an error")

    def _take(self, *, wait: bool) -> None:
        """Hands what has arrived to the engine; with `wait`, waits a little for a first message."""
        with suppress(queue.Empty):
            item = self._inbox.get(timeout=EXPIRY_CHECK_S / 5) if wait else self._inbox.get_nowait()
            for _ in range(self._inbox.maxsize):  # whoever floods us does not keep us from a step
                self._deny()  # what was heard before a message counts for it
                arrived, device, message = item
                with self._counting:
                    self._queued[device] -= 1
                    if not self._queued[device]:
                        del self._queued[device]
                self._send(self.engine.handle(device, message, arrived))
                item = self._inbox.get_nowait()

    def _deny(self) -> None:
        if self._denied is not self.engine.denied:
            self._send(self.engine.deny(self._denied))

    def _send(self, answers: list[EngineResponse]) -> None:
        for key, message in answers:
            self._publish(topics.to_device(key.device, key.session), encode(message))

    def _publish(self, topic: str, payload: bytes, *, qos: int = 0, retain: bool = False) -> None:
        try:
            self._transport.publish(topic, payload, qos=qos, retain=retain)
        except LinkError as error:
            self._log.warning("not sent on %s: %s", topic, error)
