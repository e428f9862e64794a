"""A device and a worker in one process, for notebooks, tests and measurements."""

from __future__ import annotations

import os
import queue
import sys
from collections.abc import Generator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from fleet.bundles.manifest import Bundle
from fleet.bundles.named_bundle import DEFAULT, load_named_bundle
from fleet.errors import LinkError, PromptError
from fleet.protocol import topics
from fleet.protocol.prompt import PromptRequest, Reply
from fleet.protocol.report import (
    DeviceStatus,
    GenerationReport,
    ReportReceipt,
    WorkerStatus,
    decode_report,
    decode_status,
    encode_receipt,
)
from fleet.transport.base import Transport, Will
from fleet.transport.in_memory import InMemoryBroker, InMemoryTransport
from fleet.transport.prompt_client import PromptClient
from fleet.transport.responder import Responder
from fleet.utils.optional_imports import needs

if TYPE_CHECKING:
    from cloud_broker_worker.worker.config import WorkerConfig
    from cloud_broker_worker.worker.worker import Worker
    from edge_agent.config import AgentConfig
    from edge_agent.serving.agent import Agent

DEVICE: Final = "edge-1"
WORKER: Final = "worker-1"
APP: Final = "app-1"
WATCHER: Final = "watcher"
START_S: Final = 60.0
ASSIST_DEADLINE_MS: Final = 60_000
"""Time that the device waits for the worker, which may be busy but is never away."""


class LocalFleet(Responder):
    """A fleet of one device and one worker in this process: ``with LocalFleet() as fleet:``.

    Device, worker and messages are real. The broker is in memory, without TLS and rights, and there
    is no registry. If the bundle holds the whole model for the device, no worker runs, and the
    device answers alone in every mode. A notebook calls `start` and `close` instead. `close` also
    stops what `connect`, `start_worker` and `start_device` have started.
    """

    def __init__(
        self,
        bundle: Bundle | Path | str | None = DEFAULT,
        config: AgentConfig | None = None,
        worker_config: WorkerConfig | None = None,
        *,
        broker: InMemoryBroker | None = None,
    ) -> None:
        """Store the settings.

        Args:
            bundle: a bundle, its folder, ``default``, or None for a fleet whose parts are started
                one by one.
            config: settings of the device. Without them it has half of the machine's cores, and
                waits up to a minute for the worker.
            worker_config: settings of the worker.
            broker: a broker that others may share.
        """
        self.broker = broker or InMemoryBroker()
        self._bundle = bundle
        self._config = config
        self._worker_config = worker_config
        self._stack = ExitStack()
        self._online: queue.Queue[str] = queue.Queue()
        self._client: PromptClient | None = None

    def start(self) -> Self:
        """Start the worker, if the bundle has its half, then the device, and wait for them.

        Without a bundle, none of them starts.

        Raises:
            MissingExtraError: the extra ``edge`` or ``worker`` is not installed.
            LinkError: a part is not online in time.
            FleetError: the bundle is missing or damaged, or a setting does not fit it.
        """
        try:
            self._watch(self.connect(WATCHER))
            if self._bundle is not None:
                self._start(load_named_bundle(self._bundle, _default_folder))
            self._client = PromptClient(self.connect(APP))
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """Stop the parts, the newest one first."""
        self._client = None
        self._stack.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def client(self) -> PromptClient:
        """The connection of an app.

        Raises:
            PromptError: the fleet does not run.
        """
        if self._client is None:
            raise PromptError(
                "this fleet does not run; use 'with LocalFleet() as fleet:', or call start()"
            )
        return self._client

    def respond(self, request: PromptRequest) -> Generator[Reply, None, None]:
        """Yield the replies of the device; see `PromptClient.ask`."""
        return self.client.ask(DEVICE, request)

    def connect(self, name: str, will: Will | None = None) -> InMemoryTransport:
        """Return a connection to the broker; `close` ends it."""
        return self._stack.enter_context(self.broker.connect(name, will))

    def start_worker(
        self, bundle: Bundle, config: WorkerConfig | None = None, name: str = WORKER
    ) -> tuple[Worker, InMemoryTransport]:
        """Start a worker, and wait until it is online; return it with its connection."""
        with needs("worker"):
            from cloud_broker_worker.worker.config import WorkerConfig
            from cloud_broker_worker.worker.worker import Worker

        transport = self.connect(name, Will(topics.worker_status(name), Worker.will()))
        worker = Worker(transport, bundle, config or WorkerConfig(num_threads=_num_threads()))
        self._stack.enter_context(worker)
        self._await_online(name)
        return worker, transport

    def start_device(
        self, bundle: Bundle, config: AgentConfig | None = None, name: str = DEVICE
    ) -> tuple[Agent, InMemoryTransport]:
        """Start a device, and wait until it is online; return it with its connection."""
        with needs("edge"):
            from edge_agent.config import AgentConfig
            from edge_agent.serving.agent import Agent

        config = config or AgentConfig(
            num_threads=_num_threads(), assist_deadline_ms=ASSIST_DEADLINE_MS
        )
        transport = self.connect(name, Will(topics.device_status(name), Agent.will()))
        agent = Agent(transport, bundle, config)
        self._stack.enter_context(agent)
        self._await_online(name)
        return agent, transport

    def _start(self, bundle: Bundle) -> None:
        if not bundle.manifest.is_device_only:
            self.start_worker(bundle, self._worker_config)
        self.start_device(bundle, self._config)
        if self._config:
            self.max_at_once = self._config.max_at_once

    def _await_online(self, name: str) -> None:
        try:
            while self._online.get(timeout=START_S) != name:
                pass
        except queue.Empty:
            raise LinkError(
                f"{name} is not online after {START_S:g} s; try again when the machine is less busy"
            ) from None

    def _watch(self, watcher: InMemoryTransport) -> None:
        self._watcher = watcher
        watcher.subscribe(topics.DEVICE_STATS_FILTER, self._on_report)
        watcher.subscribe(topics.WORKER_STATUS_FILTER, self._on_worker_status, qos=1)
        watcher.subscribe(topics.DEVICE_STATUS_FILTER, self._on_device_status, qos=1)

    def _on_worker_status(self, topic: str, payload: bytes) -> None:
        if decode_status(payload, WorkerStatus).online:
            self._online.put(topics.parse_topic(topic, topics.WORKER_STATUS_FILTER)[0])

    def _on_device_status(self, topic: str, payload: bytes) -> None:
        if decode_status(payload, DeviceStatus).online:
            self._online.put(topics.parse_topic(topic, topics.DEVICE_STATUS_FILTER)[0])

    def _on_report(self, topic: str, payload: bytes) -> None:
        acknowledge(self._watcher, topic, payload)


def acknowledge(link: Transport, topic: str, payload: bytes) -> GenerationReport:
    """Return the report that came on `topic`, and send a receipt as a collector does."""
    report = decode_report(payload)
    (device,) = topics.parse_topic(topic, topics.DEVICE_STATS_FILTER)
    receipt = encode_receipt(ReportReceipt((report.generation,)))
    link.publish(topics.device_reported(device), receipt)
    return report


def _default_folder() -> Path:
    from onnx_export.default_bundle import default_bundle

    return default_bundle(partial(print, file=sys.stderr, flush=True))


def _num_threads() -> int:
    """Return half of the machine's cores: both sides share them."""
    return max(1, (os.cpu_count() or 1) // 2)
