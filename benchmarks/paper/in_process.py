"""A device and a worker in one process, without a network."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple

from cloud_broker_worker.worker.config import WorkerConfig
from cloud_broker_worker.worker.worker import Worker
from edge_agent.config import AgentConfig
from edge_agent.serving.agent import Agent
from fleet.bundles.manifest import Bundle
from fleet.errors import LinkError
from fleet.protocol import topics
from fleet.protocol.modes import FALLBACK
from fleet.protocol.prompt import PromptRequest
from fleet.protocol.report import DeviceStatus, WorkerStatus, decode_status
from fleet.transport.in_memory import InMemoryBroker
from fleet.transport.prompt_client import PromptClient

DEVICE: Final = "edge-1"
WORKER: Final = "worker-1"
ASSIST_MS: Final = 60_000  # a busy machine must not change an answer
ANSWER_MS: Final = 600_000
START_S: Final = 60.0


class FleetAnswer(NamedTuple):
    """An answer of a device; `tokens_from` counts its tokens by source."""

    text: str
    token_ids: tuple[int, ...]
    tokens_from: dict[str, int]


class InProcessFleet:
    """The agent and the worker as they are deployed, on the in-memory broker."""

    def __init__(self, client: PromptClient) -> None:
        self._client = client

    def ask(self, request: PromptRequest) -> FleetAnswer:
        """Return the device's answer.

        Raises:
            PromptError: the device refuses the request.
            LinkError: the cloud did not respond.
        """
        replies = list(self._client.ask(DEVICE, request, timeout_s=ANSWER_MS / 1000))
        usage = replies[-1].usage
        sources = usage.sources if usage else {}
        if FALLBACK in sources:
            raise LinkError(
                f"expected the cloud's tokens, got {sources[FALLBACK]} of the device that the "
                f"cloud should have judged ({replies[-1].note}); "
                "run again when the machine is less busy"
            )
        token_ids = tuple(reply.token_id for reply in replies if reply.token_id is not None)
        return FleetAnswer("".join(reply.text for reply in replies), token_ids, sources)


@contextmanager
def in_process_fleet(
    bundle: Bundle, num_threads: int, max_requests: int = 1
) -> Iterator[InProcessFleet]:
    """Start the worker, then the device, each with `num_threads`, and wait for both.

    The device answers `max_requests` at once.
    """
    agent_config = AgentConfig(
        num_threads=num_threads,
        max_concurrent_requests=max_requests,
        assist_deadline_ms=ASSIST_MS,
        answer_deadline_ms=ANSWER_MS,
    )
    broker = InMemoryBroker()
    with (
        broker.connect("app") as app,
        broker.connect(WORKER) as worker_link,
        broker.connect(DEVICE) as device_link,
    ):
        online: queue.Queue[bool] = queue.Queue()
        app.subscribe(
            topics.WORKER_STATUS_FILTER,
            lambda _, p: online.put(decode_status(p, WorkerStatus).online),
            qos=1,
        )
        app.subscribe(
            topics.DEVICE_STATUS_FILTER,
            lambda _, p: online.put(decode_status(p, DeviceStatus).online),
            qos=1,
        )
        with Worker(worker_link, bundle, WorkerConfig(num_threads=num_threads)):
            online.get(timeout=START_S)
            with Agent(device_link, bundle, agent_config):
                online.get(timeout=START_S)
                yield InProcessFleet(PromptClient(app))
