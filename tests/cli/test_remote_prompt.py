"""`fleet --server URL prompt` and `chat`: answers of devices through the fleet's server."""

from __future__ import annotations

import json
import queue
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess

import msgspec
import pytest

from edge_agent.config import AgentConfig
from fleet.bundles.manifest import Bundle
from fleet.http_api.api_address import ApiAddress
from fleet.operator_api.operation import OperatorRole
from fleet.protocol import topics
from fleet.protocol.prompt import PromptRequest, parse_prompt
from fleet.protocol.report import DeviceStatus
from fleet.registry.store import Registry
from fleet.server.console.console_server import ConsoleServer
from fleet.server.console.playground import Playground
from fleet.server.home import FleetConfig, FleetHome
from fleet.server.operations.context import OperationContext
from fleet.transport.in_memory import InMemoryTransport
from tests.brokers import WAIT_S, wait_until
from tests.command_lines import run
from tests.fleet.conftest import add
from tests.system.memory_fleet import DEVICE, MemoryFleet, memory_fleet
from tests.terminal import CTRL_C, terminal

SLOW = "slow"
"""A device that sends one reply and then nothing more."""

HOSTILE = "hostile"
REPLIES = {
    SLOW: [b'{"seq":0,"text":"one "}'],
    HOSTILE: [b'{"seq":0,"text":"\\u001b[31m\\u009b2J"}', b'{"seq":1,"done":true}'],
}
SHORT = ("--max-new-tokens", "6", "--threshold", "1", "--seed", "3")


@dataclass
class Console:
    """A console over a fleet in memory, and what its devices received."""

    url: str
    key: str
    viewers_key: str
    fleet: MemoryFleet
    bundle: Bundle
    requests: list[PromptRequest]
    cancelled: queue.Queue[str]

    def run(self, *words: str, key: str | None = None) -> CompletedProcess[str]:
        return run("--server", self.url, *words, FLEET_KEY=key or self.key, COLUMNS="200")


def start_scripted(watcher: InMemoryTransport, name: str, cancelled: queue.Queue[str]) -> None:
    """Let a device answer each prompt with its `REPLIES`."""

    def reply(topic: str, _: bytes) -> None:
        app, request = topics.parse_topic(topic, topics.PROMPT_FILTER)[1:]
        for payload in REPLIES[name]:
            watcher.publish(topics.device_reply(name, app, request), payload)

    watcher.subscribe(topics.device_prompt(name, "+", "+"), reply)
    watcher.subscribe(topics.device_cancel(name, "+", "+"), lambda *_: cancelled.put(name))
    status = DeviceStatus(online=True, epoch=1, bundle_id="b", version="1", mode="auto")
    watcher.publish(topics.device_status(name), msgspec.json.encode(status), retain=True)


def register(registry: Registry, name: str, bundle_id: str, *, online: bool = True) -> None:
    add(registry, name)
    status = DeviceStatus(online=online, epoch=1, bundle_id=bundle_id, version="1", mode="auto")
    registry.stats.record_status(name, status, 1000.0)


@pytest.fixture(scope="module")
def console(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Console]:
    config = FleetConfig(host="127.0.0.1", port=1, bundle=str(tiny_bundle.folder))
    home = FleetHome.create(tmp_path_factory.mktemp("remote") / "home", config)
    bundle_id = home.keep_bundle(tiny_bundle.folder)
    requests: list[PromptRequest] = []
    cancelled: queue.Queue[str] = queue.Queue()
    with memory_fleet() as fleet, home.registry("tests") as registry:
        fleet.watcher.subscribe(
            topics.prompts_to(DEVICE), lambda _, body: requests.append(parse_prompt(body)), qos=1
        )
        fleet.start_worker(tiny_bundle)
        fleet.start_device(tiny_bundle, AgentConfig(num_threads=1, assist_deadline_ms=60_000))
        register(registry, DEVICE, bundle_id)
        register(registry, "away", bundle_id, online=False)
        for name in REPLIES:
            start_scripted(fleet.watcher, name, cancelled)
            register(registry, name, "b")
        registry.operators.add("grace", OperatorRole.OPERATOR)
        registry.operators.add("vera", OperatorRole.VIEWER)
        keys = [registry.operators.create_key(name, None).secret for name in ("grace", "vera")]
        context = OperationContext(registry, home)
        address = ApiAddress("127.0.0.1", 0)
        with (
            Playground(fleet.connect("console-gateway")) as playground,
            ConsoleServer(address, context, None, [playground.routes]) as server,
        ):
            url = f"http://127.0.0.1:{server.port}"
            grace, vera = map(str, keys)
            console = Console(url, grace, vera, fleet, tiny_bundle, requests, cancelled)
            wait_until(
                lambda: bool(console.run("prompt", HOSTILE, "hi").stdout), "the devices are online"
            )
            yield console


def test_a_prompt_is_answered_with_counts_and_json(console: Console) -> None:
    done = console.run("prompt", DEVICE, "one two three", *SHORT)
    assert done.returncode == 0, done.stderr
    assert "[6 tokens: cloud 6; " in done.stdout
    printed = json.loads(console.run("prompt", DEVICE, "one two three", *SHORT, "--json").stdout)
    (result,) = printed["results"]
    assert printed["bundle_id"] == console.bundle.manifest.bundle_id
    assert len(result["token_ids"]) == 6
    assert result["seed"] == 3
    assert "trace" not in result
    assert not console.requests[-1].trace


def test_the_options_of_a_prompt_reach_the_device(console: Console) -> None:
    words = ("--trace", "--top-logprobs", "2", "--stop", "zzz", "--temperature", "0.5")
    done = console.run("prompt", DEVICE, "one two", *SHORT, *words, "--json")
    (result,) = json.loads(done.stdout)["results"]
    assert result["trace"]
    assert len(result["logprobs"]) == 6
    sent = console.requests[-1]
    assert (sent.stop, sent.temperature, sent.top_logprobs, sent.trace) == (("zzz",), 0.5, 2, True)
    done = console.run("prompt", DEVICE, "one two", "--max-new-tokens", "4", "--n", "2", "--json")
    (result,) = json.loads(done.stdout)["results"]
    assert len(result["choices"]) == 2
    done = console.run("prompt", DEVICE, "one two", *SHORT, "--no-stream", "--json")
    assert json.loads(done.stdout)["results"][0]["text"]


@pytest.mark.parametrize("command", ["prompt", "chat"])
@pytest.mark.parametrize(
    ("device", "says"),
    [("oven", "unknown device 'oven'"), ("away", "device away is offline; start it")],
)
def test_a_device_that_is_away_is_named(
    console: Console, command: str, device: str, says: str
) -> None:
    words = (command, device, "hi") if command == "prompt" else (command, device)
    done = console.run(*words)
    assert (done.returncode, done.stdout) == (1, "")
    assert says in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_refusal_of_the_device_is_the_same_line_as_over_the_broker(console: Console) -> None:
    done = console.run("prompt", DEVICE, "hi", "--max-new-tokens", "90000")
    assert done.returncode == 1
    assert f"device {DEVICE} refused (bad_prompt)" in done.stderr


def test_a_viewer_may_not_prompt(console: Console) -> None:
    done = console.run("prompt", DEVICE, "hi", key=console.viewers_key)
    assert "this needs the role operator" in done.stderr


def test_a_hostile_reply_controls_no_terminal(console: Console) -> None:
    done = console.run("prompt", HOSTILE, "hi")
    assert "ended its response without counts" in done.stderr
    assert not {"\x1b", "\x9b"} & set(done.stdout + done.stderr)


def test_a_conversation_goes_on_without_its_oldest_turns(
    console: Console, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lines = "\n".join(letter * 120 for letter in "abcd")
    (tmp_path / "lines").write_text(lines + "\n")
    with (tmp_path / "lines").open() as file:
        monkeypatch.setattr(sys, "stdin", file)
        done = console.run("chat", DEVICE, "--max-new-tokens", "8", "--no-smooth-stream")
    assert done.returncode == 0, done.stderr
    assert "this device holds 512 positions" in done.stdout
    assert "sending it without 2 turns from the start" in done.stdout
    assert done.stdout.count(" tokens: ") == 4
    roles = [message.role for message in console.requests[-1].chat]
    assert roles == ["user", "assistant", "user"]


def test_ctrl_c_cancels_the_answer_at_the_device(
    console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLEET_SERVER", console.url)
    monkeypatch.setenv("FLEET_KEY", console.key)
    command = [sys.executable, "-m", "fleet.cli", "chat", SLOW, "--no-smooth-stream"]
    with terminal(command) as screen:
        screen.wait("> ")
        screen.type("hello\n", "one")
        screen.type(CTRL_C, "stopped")
        assert console.cancelled.get(timeout=WAIT_S) == SLOW
        screen.type("/quit\n", "")
