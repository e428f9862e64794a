"""One tiny model behind each way to prompt it: Python, MQTT and HTTP."""

from __future__ import annotations

import queue
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import urllib3

from cloud_broker_worker.worker.config import WorkerConfig
from cloud_broker_worker.worker.worker import Worker
from edge_agent import AgentConfig, Engine
from edge_agent.local_api.api_keys import ApiKeys
from edge_agent.local_api.device_backend import DeviceBackend
from edge_agent.serving.agent import Agent
from fleet import Answer, FleetClient, LocalFleet, PromptRequest
from fleet.bundles.manifest import Bundle
from fleet.http_api.api_address import ApiAddress
from fleet.http_api.api_server import ApiServer
from fleet.protocol import topics
from fleet.protocol.access import Grants, Role
from fleet.protocol.prompt import decode_reply
from fleet.protocol.report import DeviceStatus, WorkerStatus, decode_status
from fleet.transport.base import Will
from fleet.transport.mqtt import MqttTransport
from tests.brokers import HOST, Inbox, Site, running_site

WAIT_S: Final = 30.0
DEVICE: Final = "kitchen"
APP: Final = "tablet"
RAW_APP: Final = "sensor"
OTHER_APP: Final = "laptop"
FLEET: Final = (
    Grants(Role.DEVICE, DEVICE, (APP, RAW_APP, OTHER_APP)),
    Grants(Role.APP, APP, (DEVICE,)),
    Grants(Role.APP, RAW_APP, (DEVICE,)),
    Grants(Role.APP, OTHER_APP, (DEVICE, "attic")),
    Grants(Role.DEVICE, "attic", (OTHER_APP,)),
    Grants(Role.WORKER, "cloud"),
)
CONFIG: Final = AgentConfig(num_threads=1, assist_deadline_ms=20_000)
WORKER_CONFIG: Final = WorkerConfig(num_threads=1)
OF_OPENAI: Final = {
    "stop",
    "seed",
    "n",
    "temperature",
    "logprobs",
    "top_logprobs",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
}
"""Options that have the same name in OpenAI's API."""


class Outcome(NamedTuple):
    """An answer, as each way can report it: texts and ends of its choices, tokens, counts."""

    texts: tuple[str | None, ...]
    finish_reasons: tuple[str | None, ...]
    logprob_tokens: tuple[str, ...]
    num_tokens: int
    num_prompt_tokens: int
    seed: int | None


def outcome_of(answer: Answer) -> Outcome:
    choices = answer.choices
    last = answer.last
    logprobs = [each for choice in choices for each in choice.logprobs or ()] or answer.logprobs
    return Outcome(
        texts=tuple(choice.full_text for choice in choices) or (answer.text,),
        finish_reasons=tuple(choice.finish_reason for choice in choices) or (last.finish_reason,),
        logprob_tokens=tuple(each.token for each in logprobs),
        num_tokens=answer.usage.tokens,
        num_prompt_tokens=answer.usage.prompt_tokens,
        seed=answer.usage.seed,
    )


@dataclass(frozen=True)
class Ways:
    """A device with its worker over MQTT and HTTP; the same model in this process."""

    site: Site
    agent: Agent
    raw: MqttTransport
    client: FleetClient
    server: ApiServer
    local: LocalFleet
    engine: Engine

    def all(self) -> dict[str, Callable[[PromptRequest], Outcome]]:
        """The ways to a device with a worker."""
        return {
            "LocalFleet": lambda request: outcome_of(self.local.generate(request)),
            "FleetClient": lambda request: outcome_of(self.client.device(DEVICE).generate(request)),
            "MQTT": self.ask_over_mqtt,
            "HTTP": self.ask_over_http,
        }

    def ask_over_mqtt(self, request: PromptRequest) -> Outcome:
        """Ask with JSON alone, as an app without this software does."""
        replies: queue.Queue[bytes] = queue.Queue()
        name = uuid.uuid4().hex
        self.raw.subscribe(
            topics.device_reply(DEVICE, RAW_APP, name), lambda _, body: replies.put(body), qos=1
        )
        topic = topics.device_prompt(DEVICE, RAW_APP, name)
        self.raw.publish(topic, msgspec.json.encode(request), qos=1)
        received = [decode_reply(replies.get(timeout=WAIT_S))]
        while not received[-1].done:
            received.append(decode_reply(replies.get(timeout=WAIT_S)))
        return outcome_of(Answer(received))

    def ask_over_http(self, request: PromptRequest) -> Outcome:
        """Ask as a client of OpenAI's API does."""
        fields = msgspec.to_builtins(request)
        options = {name: fields.pop(name) for name in OF_OPENAI & fields.keys()}
        body = {
            "model": DEVICE,
            "messages": [{"role": "user", "content": fields.pop("prompt")}],
            "max_tokens": fields.pop("max_new_tokens"),
            "fleet": {name: value for name, value in fields.items() if name != "stream"},
            **options,
        }
        with urllib3.PoolManager(timeout=WAIT_S, retries=False) as pool:
            url = f"{self.server.url}/v1/chat/completions"
            response = pool.request("POST", url, json=body)
        assert response.status == 200, response.data
        return _outcome_of_completion(response.json())


def _outcome_of_completion(body: Mapping[str, Any]) -> Outcome:
    choices = body["choices"]
    usage = body["fleet"]["counts"]
    logprobs = [(choice.get("logprobs") or {}).get("content") or [] for choice in choices]
    return Outcome(
        texts=tuple(choice["message"]["content"] for choice in choices),
        finish_reasons=tuple(choice["finish_reason"] for choice in choices),
        logprob_tokens=tuple(each["token"] for content in logprobs for each in content),
        num_tokens=usage["tokens"],
        num_prompt_tokens=usage["prompt_tokens"],
        seed=usage["seed"],
    )


@contextmanager
def python_ways(folder: Path, bundle: Bundle) -> Iterator[Ways]:
    """All ways, ready."""
    with running_site("embedded", folder, FLEET) as site, served_device(site, bundle) as agent:
        backend = DeviceBackend(lambda: agent, ApiKeys())
        with (
            ApiServer(ApiAddress(HOST, 0), backend) as server,
            site.connect(RAW_APP) as raw,
            FleetClient(site.identity(APP)) as client,
            LocalFleet(bundle, CONFIG, WORKER_CONFIG) as local,
            Engine.load(bundle.folder, CONFIG) as engine,
        ):
            yield Ways(site, agent, raw, client, server, local, engine)


@contextmanager
def served_device(site: Site, bundle: Bundle) -> Iterator[Agent]:
    """A worker and a device over MQTT, both online."""
    statuses = Inbox()
    device_will = Will(topics.device_status(DEVICE), Agent.will())
    with (
        site.connect("cloud", Will(topics.worker_status("cloud"), Worker.will())) as cloud_link,
        site.connect(DEVICE, device_will) as link,
        Worker(cloud_link, bundle, WORKER_CONFIG),
    ):
        link.subscribe(topics.worker_status("cloud"), statuses, qos=1)
        assert decode_status(statuses.get(WAIT_S)[1], WorkerStatus).online
        link.unsubscribe(topics.worker_status("cloud"))
        with Agent(link, bundle, CONFIG) as agent, site.connect(APP) as app:
            app.subscribe(topics.device_status(DEVICE), statuses, qos=1)
            assert decode_status(statuses.get(WAIT_S)[1], DeviceStatus).online
            app.close()
            yield agent
