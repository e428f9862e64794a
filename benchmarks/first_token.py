"""Time to the first token over MQTT, over the HTTP API of a device, and over that of the fleet.

    python -m benchmarks first-token [--rounds 200] [--bundle DIR]

Server and device are processes as deployed, with a broker and its TLS; the APIs serve HTTP without
TLS, on connections that stay open. In each round, the same prompt goes each way once, in an order
that changes from round to round, so that the answers differ only in their way.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated, Any, Final

import msgspec
import typer

from edge_agent.config import CONFIG_FILE, AgentConfig
from fleet.errors import FleetError
from fleet.protocol.access import Role
from fleet.protocol.modes import Mode
from fleet.protocol.prompt import ChatMessage, PromptRequest
from fleet.server.child_process import child
from fleet.server.home import FleetConfig, FleetHome
from fleet.server.supervisor import resolve_bundle
from fleet.transport.mqtt import MqttTransport
from fleet.transport.prompt_client import PromptClient
from fleet.utils.host_address import free_port
from fleet.utils.path_options import path_option

HOST: Final = "127.0.0.1"
DEVICE: Final = "kitchen"
APP: Final = "bench"
QUESTION: Final = "What is the capital of France?"
MAX_NEW_TOKENS: Final = 4
NUM_WARM_UP: Final = 5
MQTT: Final = "MQTT"

Ask = Callable[[], float]

app = typer.Typer(add_completion=False)


def ask_over_mqtt(client: PromptClient) -> float:
    """Ask for an answer, read it to its end, and return the seconds to its first token."""
    prompt = PromptRequest(
        messages=(ChatMessage("user", QUESTION),),
        mode=Mode.STANDALONE,
        max_new_tokens=MAX_NEW_TOKENS,
    )
    started = time.perf_counter()
    replies = client.ask(DEVICE, prompt)
    next(replies)
    seconds = time.perf_counter() - started
    list(replies)
    return seconds


def ask_over_http(connection: HTTPConnection, key: str) -> float:
    """Ask for a stream, read it to its end, and return the seconds to its first token."""
    body: dict[str, Any] = {
        "model": DEVICE,
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": MAX_NEW_TOKENS,
        "stream": True,
        "fleet": {"mode": Mode.STANDALONE},
    }
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    started = time.perf_counter()
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    response = connection.getresponse()
    while b'"source"' not in (line := response.readline()):
        if not line:
            raise FleetError(f"expected a stream of tokens, got the status {response.status}")
    seconds = time.perf_counter() - started
    response.read()
    return seconds


@contextmanager
def running_fleet(bundle: Path) -> Iterator[dict[str, Ask]]:
    """Start a server and a device, and return the ways to ask the device."""
    with tempfile.TemporaryDirectory(prefix="fleet-bench-") as folder, ExitStack() as stack:
        config = FleetConfig(host=HOST, port=free_port(HOST), bundle=str(bundle), service_port=0)
        home = FleetHome.create(Path(folder), config)
        device = home.enroll(DEVICE, Role.DEVICE, Path(folder) / DEVICE)
        identity = home.enroll(APP, Role.APP, Path(folder) / APP, allow=(DEVICE,))
        with home.registry() as registry:
            key = str(registry.api_keys.create(APP))
        apis = {"HTTP, device": free_port(HOST), "HTTP, fleet": free_port(HOST)}
        options = [f"--api={HOST}:{port}" for port in apis.values()]
        server = child("the server", "fleet.cli", "server", "--home", folder, options[1])
        stack.enter_context(server).wait_ready()
        every_prompt_runs = AgentConfig(reuse_share=0.0)
        (device.folder / CONFIG_FILE).write_bytes(msgspec.json.encode(every_prompt_runs))
        arguments = (str(device.folder), "--threads", "1", options[0])
        edge = child("the device", "edge_agent", "run", *arguments)
        stack.enter_context(edge).wait_ready()
        client = PromptClient(stack.enter_context(MqttTransport.connect(identity)))
        ways: dict[str, Ask] = {MQTT: partial(ask_over_mqtt, client)}
        for name, port in apis.items():
            connection = stack.enter_context(closing(HTTPConnection(HOST, port)))
            ways[name] = partial(ask_over_http, connection, key)
        yield ways


def measure(ways: Mapping[str, Ask], rounds: int) -> dict[str, list[float]]:
    """Return the milliseconds to the first token each way, one number for each round."""
    taken_ms: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for number in range(NUM_WARM_UP + rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            taken_ms[name].append(1e3 * ways[name]())
    return {name: each[NUM_WARM_UP:] for name, each in taken_ms.items()}


def line(name: str, taken_ms: list[float], over_mqtt_ms: list[float]) -> str:
    """Return a row of the table; the difference is the median over the rounds."""
    high = quantiles(taken_ms, n=20, method="inclusive")[-1]
    difference = median(one - other for one, other in zip(taken_ms, over_mqtt_ms, strict=True))
    return f"{name:12} {median(taken_ms):9.2f} {high:15.2f} {difference:+15.2f}"


@app.command()
def run(
    rounds: Annotated[int, typer.Option(min=2, max=100_000, help="Number of rounds.")] = 200,
    bundle: Annotated[
        Path | None, path_option(help="Model bundle (default: the default model's).")
    ] = None,
) -> None:
    """Measure the time to the first token over MQTT and over HTTP, in turns."""
    folder = resolve_bundle(bundle, lambda text: print(text, file=sys.stderr))
    with running_fleet(folder) as ways:
        taken_ms = measure(ways, rounds)
    print("way          median ms  95th percentile  after MQTT, ms")
    for name, each in taken_ms.items():
        print(line(name, each, taken_ms[MQTT]))
