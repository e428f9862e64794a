"""A local fleet whose parts a test starts one by one, and what is published on its broker."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from cloud_broker_worker.worker.config import WorkerConfig
from edge_agent.config import AgentConfig
from edge_agent.serving.agent import Agent
from fleet.bundles.manifest import Bundle
from fleet.protocol import topics
from fleet.protocol.prompt import PromptRequest, Reply, decode_reply
from fleet.protocol.report import GenerationReport
from fleet.server.local_fleet import APP, DEVICE, WORKER, LocalFleet, acknowledge
from fleet.transport.answers import Answer
from fleet.transport.in_memory import InMemoryBroker, InMemoryTransport

if TYPE_CHECKING:
    from cloud_broker_worker.worker.worker import Worker

__all__ = ["APP", "DEVICE", "WAIT_S", "WORKER", "Answer", "MemoryFleet", "memory_fleet"]

WAIT_S: Final = 120.0


class MemoryFleet(LocalFleet):
    """A fleet without parts, so that a test can leave one out, stop it, or start it again."""

    def __init__(self, broker: InMemoryBroker | None = None) -> None:
        super().__init__(None, broker=broker)
        self.agents: dict[str, Agent] = {}
        self.reports: queue.Queue[GenerationReport] = queue.Queue()
        self._raw: dict[str, queue.Queue[Reply]] = {}

    def start_worker(
        self, bundle: Bundle, config: WorkerConfig | None = None, name: str = WORKER
    ) -> tuple[Worker, InMemoryTransport]:
        return super().start_worker(bundle, config or WorkerConfig(num_threads=1), name)

    def start_device(
        self, bundle: Bundle, config: AgentConfig | None = None, name: str = DEVICE
    ) -> tuple[Agent, InMemoryTransport]:
        agent, link = super().start_device(bundle, config or AgentConfig(num_threads=1), name)
        self.agents[name] = agent
        return agent, link

    @property
    def watcher(self) -> InMemoryTransport:
        """A connection that receives what the parts publish."""
        return self._watcher

    def _watch(self, watcher: InMemoryTransport) -> None:
        super()._watch(watcher)
        watcher.subscribe(topics.device_reply("+", "+", "+"), self._on_reply, qos=1)

    def _on_report(self, topic: str, payload: bytes) -> None:
        self.reports.put(acknowledge(self.watcher, topic, payload))

    def _on_reply(self, topic: str, payload: bytes) -> None:
        self._raw.setdefault(topic.rsplit("/", 1)[1], queue.Queue()).put(decode_reply(payload))

    def next_reply(self, request: str) -> Reply:
        """The next reply to a request that was published by hand."""
        return self._raw.setdefault(request, queue.Queue()).get(timeout=WAIT_S)

    def ask(
        self,
        prompt: PromptRequest,
        device: str = DEVICE,
        fault: Callable[[], None] = lambda: None,
        at: int = 4,
    ) -> Answer:
        """An answer; `fault()` happens after its reply number `at`."""
        answer = Answer()
        for reply in self.client.ask(device, prompt, timeout_s=WAIT_S):
            answer.replies.append(reply)
            if reply.seq == at:
                fault()
        return answer


@contextmanager
def memory_fleet(broker: InMemoryBroker | None = None) -> Iterator[MemoryFleet]:
    with MemoryFleet(broker) as fleet:
        yield fleet
