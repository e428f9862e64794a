"""Answers of a device and a worker in one process, none of them without the cloud."""

from __future__ import annotations

from typing import Final, NamedTuple

from cloud_broker_worker.worker.config import WorkerConfig
from edge_agent.config import AgentConfig
from fleet.bundles.manifest import Bundle
from fleet.errors import LinkError
from fleet.protocol.modes import FALLBACK
from fleet.protocol.prompt import PromptRequest
from fleet.server.local_fleet import ASSIST_DEADLINE_MS, DEVICE, LocalFleet
from fleet.transport.answers import Answer
from fleet.transport.in_memory import InMemoryBroker

ANSWER_MS: Final = 600_000


class FleetAnswer(NamedTuple):
    """An answer of a device; `tokens_from` counts its tokens by source."""

    text: str
    token_ids: tuple[int, ...]
    tokens_from: dict[str, int]


class InProcessFleet(LocalFleet):
    """The agent and the worker as they are deployed, each with `num_threads`.

    The device answers `max_requests` at once.
    """

    def __init__(
        self,
        bundle: Bundle,
        num_threads: int,
        max_requests: int = 1,
        broker: InMemoryBroker | None = None,
    ) -> None:
        config = AgentConfig(
            num_threads=num_threads,
            max_concurrent_requests=max_requests,
            assist_deadline_ms=ASSIST_DEADLINE_MS,
            answer_deadline_ms=ANSWER_MS,
        )
        super().__init__(bundle, config, WorkerConfig(num_threads=num_threads), broker=broker)

    def ask(self, request: PromptRequest) -> FleetAnswer:
        """Return the device's answer.

        Raises:
            PromptError: the device refuses the request.
            LinkError: the cloud did not respond.
        """
        answer = Answer(self.client.ask(DEVICE, request, timeout_s=ANSWER_MS / 1000))
        if FALLBACK in answer.sources:
            raise LinkError(
                f"expected the cloud's tokens, got {answer.sources[FALLBACK]} of the device that "
                f"the cloud should have judged ({answer.last.note}); "
                "run again when the machine is less busy"
            )
        return FleetAnswer(answer.text, tuple(answer.token_ids), answer.sources)
