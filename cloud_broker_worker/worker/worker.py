"""The worker passes messages from the broker to the engine, and the engine's responses back."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Self

from cloud_broker_worker.worker.config import Weights, WorkerConfig
from cloud_broker_worker.worker.engine import EngineResponse, WorkerEngine
from cloud_broker_worker.worker.upper_layers import UpperLayers
from fleet.bundles.manifest import Bundle
from fleet.constraints.grammars import bundle_grammars
from fleet.errors import LinkError, ProtocolError
from fleet.protocol import topics
from fleet.protocol.codec import decode_to_worker, encode
from fleet.protocol.denylist import decode_denylist
from fleet.protocol.messages import Open, ToWorker
from fleet.protocol.report import DeviceStatus, WorkerStatus, decode_status, encode_status
from fleet.transport.base import Transport
from fleet.utils.optional_imports import needs
from fleet.utils.rate_limited_log import RateLimitedLog
from fleet.utils.validation import validated
from fleet.version import __version__

if TYPE_CHECKING:
    from cloud_broker_worker.worker.lower_layers import LowerLayers

log = logging.getLogger(__name__)

EXPIRY_CHECK_S: Final = 1.0
STOP_TIMEOUT_S: Final = 5.0
DRAIN_CHECK_S: Final = 0.1
QUEUE_SHARE: Final = 0.25  # part of the queue that one device may fill, so that others find room


class Worker:
    """A worker that serves one bundle. As a context manager, it announces itself and serves until
    it is closed.

    Its thread repeats a cycle: it processes the queued messages and runs a step. At the start of
    each cycle it sets `last_cycle_at` (monotonic seconds) and calls `on_cycle`.
    """

    def __init__(self, transport: Transport, bundle: Bundle, config: WorkerConfig) -> None:
        """Load the bundle.

        Raises:
            BundleError: the cloud partition does not load, or the lower layers do not.
            ConfigError: a setting is out of its range.
            MissingExtraError: the lower layers need the extra ``edge``.
        """
        config = validated(config)
        self.name = transport.name
        layers = UpperLayers(bundle, config.num_threads, config.weights, config.from_layer)
        self.engine = WorkerEngine(
            layers,
            transport.name,
            config,
            grammars=bundle_grammars(bundle),
            lower_layers=load_lower_layers(bundle, config, layers.upload_layers),
        )
        self._transport = transport
        self._bundle_id = bundle.manifest.bundle_id
        self._config = config
        self._announced = 0
        self.last_cycle_at = time.monotonic()
        self.on_cycle: Callable[[], None] = lambda: None
        self._epoch = time.time_ns() // 1_000_000
        # A device's message, or its status when it has gone or come back.
        self._queue = queue.Queue[tuple[float, str, ToWorker | DeviceStatus]](
            config.max_queued_messages
        )
        self._num_queued_by = Counter[str]()  # messages of each device in the queue
        self._queue_lock = threading.Lock()
        self._denied = self.engine.denied  # the newest list; the thread passes it to the engine
        self._thread = threading.Thread(target=self._serve, name=f"worker-{self.name}", daemon=True)
        self._open_filter = (
            topics.shared_open_filter(self._bundle_id)
            if config.shared_opens
            else topics.OPEN_FILTER
        )
        self._stopping = threading.Event()
        self._announce_lock = threading.Lock()
        self._log = RateLimitedLog(log)

    def __enter__(self) -> Self:
        self._thread.start()
        self._transport.subscribe(topics.REVOKED, self._on_revoked, qos=1, retained=True)
        self._transport.subscribe(
            topics.sessions_of_worker(self.name), self._on_message, live_only=True
        )
        self._transport.subscribe(self._open_filter, self._on_message, qos=1, live_only=True)
        self._transport.subscribe(topics.DEVICE_STATUS_FILTER, self._on_device_status, qos=1)
        self._transport.on_up(self._announce)
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join(STOP_TIMEOUT_S)
        if not self.is_serving:  # if a step still runs, the devices learn it from the status
            self._send(self.engine.dismiss())
        self._publish(topics.worker_status(self.name), self.will(), qos=1, retain=True)

    def drain(self, hurry: threading.Event) -> None:
        """Accept no more sessions and serve the existing ones until they end, at most
        `drain_timeout_s` seconds.

        Devices that know another worker leave at once. Setting `hurry` ends the wait.
        """
        self.engine.is_draining = True
        self._transport.unsubscribe(self._open_filter)
        self._announce()
        deadline = time.monotonic() + self._config.drain_timeout_s
        while self.engine.num_in_use and time.monotonic() < deadline:
            if hurry.wait(DRAIN_CHECK_S):
                break

    @property
    def weights(self) -> Weights:
        """The kind of its weights."""
        return self._config.weights

    @property
    def is_serving(self) -> bool:
        """Whether the worker's thread runs."""
        return self._thread.is_alive()

    @property
    def is_connected(self) -> bool:
        """Whether the link to the broker is up."""
        return self._transport.is_up

    @property
    def num_queued(self) -> int:
        """Number of messages that have arrived and wait to be processed."""
        return self._queue.qsize()

    @staticmethod
    def will() -> bytes:
        """Return the status payload of a worker that is offline."""
        return encode_status(WorkerStatus(online=False, epoch=0))

    def _announce(self) -> None:
        with self._announce_lock:  # of two threads, the later one must not publish an older status
            self._announced = self.engine.num_in_use
            status = WorkerStatus(
                online=True,
                epoch=self._epoch,
                bundle_ids=(self._bundle_id,),
                version=__version__,
                num_sessions=self._announced,
                draining=self.engine.is_draining,
                weights=self._config.weights,
            )
            self._publish(
                topics.worker_status(self.name), encode_status(status), qos=1, retain=True
            )

    def _on_message(self, topic: str, payload: bytes) -> None:
        """Decode a message and queue it. The topic names the device; the broker has checked that
        the sender may use this topic.
        """
        try:
            message = decode_to_worker(payload)
            device = sender_of(topic, message)
        except ProtocolError as error:
            self._log.warning("message on %.200r dropped: %s", topic, error)
            return
        self._enqueue(topic, device, message)

    def _on_device_status(self, topic: str, payload: bytes) -> None:
        """Queue that a device with sessions here went offline or came back."""
        try:
            (device,) = topics.parse_topic(topic, topics.DEVICE_STATUS_FILTER)
            if any(key.device == device for key in list(self.engine.sessions)):
                self._enqueue(topic, device, decode_status(payload, DeviceStatus))
        except ProtocolError as error:
            self._log.warning("message on %.200r dropped: %s", topic, error)

    def _enqueue(self, topic: str, device: str, message: ToWorker | DeviceStatus) -> None:
        with self._queue_lock:
            num_own = self._num_queued_by[device]
            has_room = num_own < self._queue.maxsize * QUEUE_SHARE and not self._queue.full()
            if has_room:
                self._num_queued_by[device] = num_own + 1
                self._queue.put_nowait((time.monotonic(), device, message))
        if not has_room:
            text = "message on %.200r dropped: %d messages wait, %d of them from this device"
            self._log.warning(text, topic, self._queue.qsize(), num_own)

    def _on_revoked(self, topic: str, payload: bytes) -> None:
        """Replace the set of denied devices; a malformed message changes nothing."""
        try:
            self._denied = decode_denylist(payload)
        except ProtocolError as error:
            self._log.warning("message on %.200r dropped: %s", topic, error)

    def _serve(self) -> None:
        next_check = time.monotonic()
        is_idle = True
        while not self._stopping.is_set():
            self.last_cycle_at = time.monotonic()
            self.on_cycle()
            try:
                self._apply_denylist()
                self._handle_queued(wait=is_idle)
                is_idle = True  # kept if a step raises, so that there is a pause between errors
                responses = self.engine.step()
                is_idle = responses is None
                self._send(responses or [])
                if time.monotonic() > next_check:
                    self.engine.expire()
                    if self.engine.num_in_use != self._announced:
                        self._announce()
                    next_check = time.monotonic() + EXPIRY_CHECK_S
            except Exception:  # the outermost boundary: one bad session must not end the worker
                log.exception("the worker continues after an error")

    def _handle_queued(self, *, wait: bool) -> None:
        """Pass the queued messages to the engine. With `wait`, wait a short time for the first."""
        with suppress(queue.Empty):
            item = self._queue.get(timeout=EXPIRY_CHECK_S / 5) if wait else self._queue.get_nowait()
            for _ in range(
                self._queue.maxsize
            ):  # a flood of messages must not prevent the next step
                self._apply_denylist()  # a list applies to all messages that arrived after it
                arrived, device, message = item
                with self._queue_lock:
                    self._num_queued_by[device] -= 1
                    if not self._num_queued_by[device]:
                        del self._num_queued_by[device]
                if isinstance(message, DeviceStatus):
                    self.engine.observe(device, message)
                else:
                    self._send(self.engine.handle(device, message, arrived))
                item = self._queue.get_nowait()

    def _apply_denylist(self) -> None:
        if self._denied is not self.engine.denied:
            self._send(self.engine.deny(self._denied))

    def _send(self, responses: list[EngineResponse]) -> None:
        for key, message in responses:
            self._publish(topics.to_device(key.device, key.session), encode(message))

    def _publish(self, topic: str, payload: bytes, *, qos: int = 0, retain: bool = False) -> None:
        try:
            self._transport.publish(topic, payload, qos=qos, retain=retain)
        except LinkError as error:
            self._log.warning("not sent on %s: %s", topic, error)


def load_lower_layers(
    bundle: Bundle, config: WorkerConfig, upload_layers: Sequence[int]
) -> LowerLayers | None:
    """Load the bundle's lower layers if the settings ask for them.

    Raises:
        BundleError: they do not load on this machine.
        MissingExtraError: the extra ``edge`` is not installed.
    """
    if not config.lower_layers:
        return None
    with needs("edge,worker"):
        from cloud_broker_worker.worker.lower_layers import LowerLayers

    return LowerLayers(bundle, config.num_threads, upload_layers)


def sender_of(topic: str, message: ToWorker) -> str:
    """Return the device that has sent a message, from its topic.

    An `Open` may come to all workers or to this one, like the later messages of its session.

    Raises:
        ProtocolError: the message is not allowed on this topic.
    """
    if isinstance(message, Open) and topics.matches(topics.OPEN_FILTER, topic):
        (device,) = topics.parse_topic(topic, topics.OPEN_FILTER)
        return device
    _, device, session = topics.parse_topic(topic, topics.TO_WORKER_FILTER)
    if message.session != session:
        raise ProtocolError(f"expected session {session} of the topic, got {message.session}")
    return device
