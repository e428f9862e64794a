"""A device with its HTTP API, in this process, whose broker is in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Final

import urllib3

from edge_agent.config import AgentConfig
from edge_agent.local_api.api_keys import ApiKeys
from edge_agent.local_api.device_backend import DeviceBackend
from edge_agent.serving.agent import Agent
from fleet.bundles.manifest import Bundle
from fleet.http_api.api_address import ApiAddress
from fleet.http_api.api_server import ApiServer
from fleet.protocol.prompt import PromptRequest
from fleet.transport.in_memory import InMemoryBroker, InMemoryTransport
from fleet.transport.prompt_client import PromptClient
from tests.brokers import wait_until

DEVICE: Final = "edge-1"
WAIT_S: Final = 120.0


@dataclass(frozen=True)
class DeviceApi:
    """The parts of the device, and requests to its API."""

    server: ApiServer
    agent: Agent
    transport: InMemoryTransport
    broker: InMemoryBroker
    key: str | None

    @property
    def url(self) -> str:
        return self.server.url

    def get(self, path: str, **headers: str) -> urllib3.BaseHTTPResponse:
        """The response to a GET request."""
        return self._request("GET", path, headers)

    def post(self, path: str, body: Any, **headers: str) -> urllib3.BaseHTTPResponse:
        """The response to a body, sent as it is if it is bytes, else as JSON."""
        if isinstance(body, bytes):
            return self._request("POST", path, headers, body=body)
        return self._request("POST", path, headers, json=body)

    def _request(
        self, method: str, path: str, headers: dict[str, str], **body: Any
    ) -> urllib3.BaseHTTPResponse:
        if self.key:
            headers = {"Authorization": f"Bearer {self.key}"} | headers
        with urllib3.PoolManager(headers=headers, timeout=WAIT_S, retries=False) as pool:
            return pool.request(method, self.url + path, **body)

    def text_over_mqtt(self, prompt: PromptRequest) -> str:
        """The text of an answer to a prompt that comes over the broker."""
        with self.broker.connect("app-1") as app:
            replies = PromptClient(app).ask(DEVICE, prompt, timeout_s=WAIT_S)
            return "".join(reply.text for reply in replies)


@contextmanager
def device_api(
    bundle: Bundle, config: AgentConfig | None = None, key: str | None = None
) -> Iterator[DeviceApi]:
    """A running device."""
    broker = InMemoryBroker()
    keys = ApiKeys((key,) if key else ())
    transport = broker.connect(DEVICE)
    agent = Agent(transport, bundle, config or AgentConfig(num_threads=1))
    server = ApiServer(ApiAddress("127.0.0.1", 0), DeviceBackend(lambda: agent, keys))
    with transport, agent, server:
        yield DeviceApi(server, agent, transport, broker, key)


def hang_up(agents: Sequence[Agent], close: Callable[[], object]) -> None:
    """Close the connection of a client whose answer has begun, and wait until it is cancelled.

    No token is generated until then, so that the answer cannot end in another way.
    """
    with ExitStack() as stack:
        for agent in agents:
            stack.enter_context(agent._model_lock.of("test"))
        active = [job for agent in agents for job in list(agent._active.values())]
        going_on = [job for job in active if not job.cancelled.is_set()]
        close()
        wait_until(lambda: any(job.cancelled.is_set() for job in going_on), "a cancelled answer")


def wait_without_requests(agent: Agent) -> None:
    """Wait until no request is active or waits, and none holds memory."""
    jobs = agent._jobs
    wait_until(lambda: agent.is_idle, "no request is active")
    wait_until(lambda: jobs.free_bytes == jobs.budget_bytes, "no request holds memory")
    assert jobs.num_waiting == 0
