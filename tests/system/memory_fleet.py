"""A device and a worker on the in-memory broker: everything real but the wire."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cloud_broker_worker.worker.config import WorkerConfig
from edge_agent.config import AgentConfig
from edge_agent.serving.agent import Agent
from fleet.bundles.manifest import Bundle
from fleet.protocol import topics
from fleet.protocol.prompt import PromptRequest, Reply, decode_reply
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

if TYPE_CHECKING:
    from cloud_broker_worker.worker.worker import Worker

WAIT_S = 120.0
DEVICE = "edge-1"
WORKER = "worker-1"
APP = "app-1"


@dataclass
class Answer:
    """One answer, put together from its replies."""

    replies: list[Reply] = field(default_factory=list)

    @property
    def token_ids(self) -> list[int]:
        return [reply.token_id for reply in self.replies if reply.token_id is not None]

    @property
    def text(self) -> str:
        return "".join(reply.text for reply in self.replies)

    @property
    def last(self) -> Reply:
        return self.replies[-1]

    @property
    def sources(self) -> dict[str, int]:
        assert self.last.usage is not None
        return self.last.usage.sources


class MemoryFleet:
    """Starts parts one by one, so that a test can leave one out, stop it, or start it again."""

    def __init__(self, stack: ExitStack, broker: InMemoryBroker) -> None:
        self.broker = broker
        self.reports: queue.Queue[GenerationReport] = queue.Queue()
        self._stack = stack
        self._worker_status: queue.Queue[WorkerStatus] = queue.Queue()
        self._device_status: queue.Queue[DeviceStatus] = queue.Queue()
        self.watcher = self._connect("watcher")
        self.watcher.subscribe(topics.DEVICE_STATS_FILTER, self._on_report)
        self.watcher.subscribe(
            topics.WORKER_STATUS_FILTER,
            lambda _, p: self._worker_status.put(decode_status(p, WorkerStatus)),
            qos=1,
        )
        self.watcher.subscribe(
            topics.DEVICE_STATUS_FILTER,
            lambda _, p: self._device_status.put(decode_status(p, DeviceStatus)),
            qos=1,
        )
        self.client = PromptClient(self._connect(APP))
        self._raw: dict[str, queue.Queue[Reply]] = {}
        self.watcher.subscribe(topics.device_reply("+", "+", "+"), self._on_reply, qos=1)

    def _connect(self, name: str, will: Will | None = None) -> InMemoryTransport:
        return self._stack.enter_context(self.broker.connect(name, will))

    def start_worker(
        self, bundle: Bundle, config: WorkerConfig | None = None, name: str = WORKER
    ) -> tuple[Worker, InMemoryTransport]:
        # A process that starts none of them does not import PyTorch.
        from cloud_broker_worker.worker.worker import Worker

        transport = self._connect(name, Will(topics.worker_status(name), Worker.will()))
        worker = Worker(transport, bundle, config or WorkerConfig(num_threads=1))
        self._stack.enter_context(worker)
        while not self._worker_status.get(timeout=WAIT_S).online:
            pass
        return worker, transport

    def start_device(
        self, bundle: Bundle, config: AgentConfig | None = None, name: str = DEVICE
    ) -> tuple[Agent, InMemoryTransport]:
        transport = self._connect(name, Will(topics.device_status(name), Agent.will()))
        agent = Agent(transport, bundle, config or AgentConfig(num_threads=1))
        self._stack.enter_context(agent)
        while not self._device_status.get(timeout=WAIT_S).online:
            pass
        return agent, transport

    def _on_report(self, topic: str, payload: bytes) -> None:
        self.reports.put(acknowledge(self.watcher, topic, payload))

    def _on_reply(self, topic: str, payload: bytes) -> None:
        self._raw.setdefault(topic.rsplit("/", 1)[1], queue.Queue()).put(decode_reply(payload))

    def next_reply(self, request: str) -> Reply:
        """The next reply to a request that was published by hand."""
        return self._raw.setdefault(request, queue.Queue()).get(timeout=WAIT_S)

    def ask(self, prompt: PromptRequest, device: str = DEVICE) -> Answer:
        return Answer(list(self.client.ask(device, prompt, timeout_s=WAIT_S)))


def acknowledge(link: Transport, topic: str, payload: bytes) -> GenerationReport:
    """The report that came on `topic`; its device is told that it is stored."""
    report = decode_report(payload)
    (device,) = topics.parse_topic(topic, topics.DEVICE_STATS_FILTER)
    link.publish(
        topics.device_reported(device), encode_receipt(ReportReceipt((report.generation,)))
    )
    return report


@contextmanager
def memory_fleet(broker: InMemoryBroker | None = None) -> Iterator[MemoryFleet]:
    with ExitStack() as stack:
        yield MemoryFleet(stack, broker or InMemoryBroker())
