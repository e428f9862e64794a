"""The fleet's HTTP API on an in-memory broker, with devices whose replies a test decides."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import aiohttp
import msgspec

from edge_agent.serving.agent import Agent
from fleet.http_api.api_address import ApiAddress
from fleet.http_api.api_server import ApiServer
from fleet.protocol import topics
from fleet.protocol.access import Role
from fleet.protocol.prompt import ErrorInfo, Reply
from fleet.protocol.report import DeviceLoad, DeviceStatus, encode_load, encode_status
from fleet.registry.store import Registry
from fleet.server.gateway.fleet_backend import LIMITS, ApiLimits, FleetBackend
from fleet.server.gateway.key_access import KeyAccess
from fleet.transport.base import Will
from fleet.transport.in_memory import InMemoryBroker
from tests.brokers import HOST, wait_until
from tests.fleet.conftest import add

WAIT_S: Final = 120.0
APP: Final = "phone"
DEVICES: Final = ("attic", "kitchen")
HELLO: Final = [{"role": "user", "content": "hello"}]


class ManualDevice:
    """A device that publishes its status, and the replies that a test gives it."""

    def __init__(self, stack: ExitStack, broker: InMemoryBroker, name: str) -> None:
        will = Will(topics.device_status(name), Agent.will())
        self.name = name
        self.link = stack.enter_context(broker.connect(name, will))
        self.prompts: queue.Queue[tuple[str, str]] = queue.Queue()  # app and request
        self.cancelled: queue.Queue[str] = queue.Queue()
        self.link.subscribe(topics.prompts_to(name), self._on_prompt, qos=1)
        self.link.subscribe(topics.cancels_to(name), self._on_cancel, qos=1)
        self.announce()

    def announce(self, epoch: int = 1) -> None:
        payload = encode_status(DeviceStatus(online=True, epoch=epoch))
        self.link.publish(topics.device_status(self.name), payload, qos=1, retain=True)

    def report_load(self, **counts: int) -> None:
        self.link.publish(topics.device_load(self.name), encode_load(DeviceLoad(**counts)))

    def next_prompt(self) -> tuple[str, str]:
        return self.prompts.get(timeout=WAIT_S)

    def reply(self, prompt: tuple[str, str], reply: Reply) -> None:
        topic = topics.device_reply(self.name, *prompt)
        self.link.publish(topic, msgspec.json.encode(reply), qos=1)

    def begin(self, prompt: tuple[str, str]) -> None:
        """Send the first token of an answer that does not end."""
        self.reply(prompt, Reply(seq=0, text=f"{self.name}:", generation=f"g-{prompt[1]}"))

    def finish(self, prompt: tuple[str, str], text: str = "done") -> None:
        last = Reply(seq=1, text=text, done=True, finish_reason="stop")
        self.begin(prompt)
        self.reply(prompt, last)

    def refuse(self, prompt: tuple[str, str], code: str) -> None:
        error = ErrorInfo(code, f"refused as {code}")
        last = Reply(seq=0, done=True, finish_reason="error", error=error)
        self.reply(prompt, last)

    def _on_prompt(self, topic: str, payload: bytes) -> None:
        del payload
        _, app, request = topics.parse_topic(topic, topics.PROMPT_FILTER)
        self.prompts.put((app, request))

    def _on_cancel(self, topic: str, payload: bytes) -> None:
        del payload
        self.cancelled.put(topic.rsplit("/", 1)[1])


class ApiFleet:
    """The registry, the broker, and the API at `url`; `key` is one of the app `APP`."""

    def __init__(self, stack: ExitStack, database: Path, limits: ApiLimits) -> None:
        self.stack = stack
        self.registry = stack.enter_context(Registry.open(database))
        for device in DEVICES:
            add(self.registry, device, group="home")
        add(self.registry, APP, Role.APP, targets=("home",))
        self.key = str(self.registry.api_keys.create(APP))
        self.broker = InMemoryBroker()
        self.access = KeyAccess(self.registry)
        self.access.follow()
        self.link = stack.enter_context(self.broker.connect("http-api"))
        self.backend = stack.enter_context(FleetBackend(self.link, self.access, limits))
        server = ApiServer(ApiAddress(HOST, 0), self.backend, needs_key=True)
        self.url = stack.enter_context(server).url

    def device(self, name: str) -> ManualDevice:
        """Start a device, and wait until the gateway knows that it is online."""
        device = ManualDevice(self.stack, self.broker, name)
        self.wait_online(name)
        return device

    def wait_online(self, name: str, *, online: bool = True) -> None:
        directory = self.backend.directory
        wait_until(lambda: directory.states([name])[name].online is online, f"{name} online")

    def wait_idle(self) -> None:
        """Wait until no answer holds a place."""
        wait_until(lambda: self.backend.num_active == 0, "no answer in progress")

    def follow(self) -> None:
        """Do what the server does once a second."""
        self.access.follow()
        self.backend.end_invalid()

    def session(self, key: str | None = None) -> aiohttp.ClientSession:
        headers = {"Authorization": f"Bearer {self.key if key is None else key}"}
        timeout = aiohttp.ClientTimeout(total=WAIT_S)
        connector = aiohttp.TCPConnector(limit=0)
        return aiohttp.ClientSession(
            self.url, headers=headers, timeout=timeout, connector=connector
        )


@contextmanager
def api_fleet(database: Path, limits: ApiLimits = LIMITS) -> Iterator[ApiFleet]:
    """Start a fleet whose registry is the SQLite file `database`, which has its tables."""
    with ExitStack() as stack:
        yield ApiFleet(stack, database, limits)


def chat(model: str, **fields: Any) -> dict[str, Any]:
    """The body of a chat completion."""
    return {"model": model, "messages": HELLO, **fields}
