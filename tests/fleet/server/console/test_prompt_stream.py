"""Prompts of operators: the streamed answer, its end, its limits, and its privacy."""

from __future__ import annotations

import json
import queue
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
import urllib3
from aiohttp import web

from edge_agent.config import AgentConfig
from fleet.bundles.manifest import Bundle
from fleet.errors import CredentialsError
from fleet.operator_api.operation import PREFIX, OperatorRole, SignedInOperator
from fleet.protocol import topics
from fleet.protocol.access import is_operator
from fleet.protocol.report import DeviceStatus
from fleet.server.console import prompt_stream
from fleet.server.console.api_routes import SIGN_IN_CHECK
from fleet.server.console.operator_prompts import OperatorPromptLimits, OperatorPrompts, app_of
from fleet.server.console.prompt_stream import STILL_ALIVE, PromptStream
from fleet.transport.threaded_server import STOP_S, ThreadedServer
from tests.brokers import WAIT_S, wait_until
from tests.fleet.operator_api.api_fleet import KEYS, Handler, authenticate
from tests.system.memory_fleet import DEVICE, MemoryFleet, memory_fleet

SHORT = {
    "prompt": "one two three one two",
    "max_new_tokens": 8,
    "ignore_eos": True,
    "mode": "collaborative",
    "threshold": 1.0,
}


class PromptServer(ThreadedServer):
    """The route of prompts alone, on an address of this machine."""

    def __init__(self, prompts: OperatorPrompts) -> None:
        super().__init__("prompts", "127.0.0.1", 0)
        self.is_signed_in = True
        self._stream = PromptStream(prompts, check_s=0.05)

    async def _check(self) -> SignedInOperator:
        if not self.is_signed_in:
            raise CredentialsError("the session has ended; sign in again")
        return SignedInOperator("operator", OperatorRole.OPERATOR)

    @web.middleware
    async def _with_check(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        request[SIGN_IN_CHECK] = self._check
        return await handler(request)

    async def _serve_on(self, listener: socket.socket) -> None:
        app = web.Application(middlewares=[authenticate, self._with_check])
        app.router.add_routes(self._stream.routes())
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=STOP_S / 2)
        await runner.setup()
        await web.SockSite(runner, listener).start()
        await self._until_stopped()
        await runner.cleanup()


@pytest.fixture(scope="module")
def fleet(tiny_bundle: Bundle) -> Iterator[MemoryFleet]:
    with memory_fleet() as fleet:
        fleet.start_worker(tiny_bundle)
        fleet.start_device(tiny_bundle, AgentConfig(num_threads=1, assist_deadline_ms=60_000))
        yield fleet


@pytest.fixture(scope="module")
def prompts(fleet: MemoryFleet) -> Iterator[OperatorPrompts]:
    limits = OperatorPromptLimits(max_per_operator=2, max_active=3)
    with OperatorPrompts(fleet.connect("console"), limits) as prompts:
        wait_until(lambda: prompts.is_online(DEVICE), "the device is online")
        yield prompts


@pytest.fixture
def server(prompts: OperatorPrompts) -> Iterator[PromptServer]:
    with PromptServer(prompts) as server:
        yield server


def ask(
    server: PromptServer,
    body: object = SHORT,
    role: OperatorRole = OperatorRole.OPERATOR,
    device: str = DEVICE,
) -> urllib3.BaseHTTPResponse:
    """Send a prompt; return the response, whose body is not read yet."""
    return urllib3.request(
        "POST",
        f"http://127.0.0.1:{server.port}{PREFIX}/devices/{device}/prompts",
        body=body if isinstance(body, bytes) else json.dumps(body).encode(),
        headers={
            "Authorization": f"Bearer {KEYS[role]}",
            "Content-Type": "application/json",
            "Connection": "close",
        },
        preload_content=False,
        retries=False,
        timeout=WAIT_S,
    )


def events_of(response: urllib3.BaseHTTPResponse) -> list[tuple[str, Any]]:
    """Return the names and data of the events, once the stream has ended."""
    blocks = response.read().decode().split("\n\n")
    lines = [block.split("\n") for block in blocks if block.startswith("event: ")]
    return [
        (name.removeprefix("event: "), json.loads(data.removeprefix("data: ")))
        for name, data in lines
    ]


def error_of(response: urllib3.BaseHTTPResponse) -> tuple[int, str]:
    return response.status, json.loads(response.read())["error"]["message"]


def test_an_answer_is_streamed_with_its_trace(server: PromptServer) -> None:
    response = ask(server)
    assert response.headers["Content-Type"] == "text/event-stream"
    assert response.headers["Cache-Control"] == "no-store"
    events = events_of(response)
    replies = [data for name, data in events if name == "reply"]
    assert len(replies) == len(events)
    assert [reply["seq"] for reply in replies] == list(range(len(replies)))
    assert all("trace" in reply for reply in replies)
    last = replies[-1]
    assert last["usage"]["tokens"] == len(replies) - 1 == 8
    assert last["full_text"] == "".join(reply.get("text", "") for reply in replies)


def test_an_answer_has_no_trace_if_it_is_not_wanted_or_not_streamed(server: PromptServer) -> None:
    for name in ("trace", "stream"):
        replies = [data for _, data in events_of(ask(server, SHORT | {name: False}))]
        assert not any("trace" in reply for reply in replies)
        assert replies[-1]["full_text"]


def test_a_stream_begins_before_a_reply_that_takes_long(
    fleet: MemoryFleet,
    prompts: OperatorPrompts,
    server: PromptServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Proxies cut connections on which nothing comes."""
    monkeypatch.setattr(prompt_stream, "FIRST_S", 0.05)
    device = SlowDevice(fleet, "mute", ())
    device.start(prompts)
    response = ask(server, device="mute")
    assert response.status == 200
    assert response.read(len(STILL_ALIVE)) == STILL_ALIVE
    device.set_online(is_online=False)
    assert [name for name, _ in events_of(response)] == ["problem"]


def test_operators_are_apps_of_their_own(fleet: MemoryFleet, server: PromptServer) -> None:
    apps: list[str] = []
    fleet.watcher.subscribe(
        topics.device_prompt("+", "+", "+"),
        lambda topic, _: apps.append(topics.parse_topic(topic, topics.PROMPT_FILTER)[1]),
    )
    for role in (OperatorRole.OPERATOR, OperatorRole.ADMIN):
        assert events_of(ask(server, role=role))
    fleet.watcher.unsubscribe(topics.device_prompt("+", "+", "+"))
    assert apps == [app_of("operator"), app_of("admin")]
    assert len(set(apps)) == 2
    assert all(is_operator(app) for app in apps)


def test_a_viewer_may_not_prompt(server: PromptServer) -> None:
    status, message = error_of(ask(server, role=OperatorRole.VIEWER))
    assert (status, "needs the role operator" in message) == (403, True)


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"", 400, "expected a JSON object"),
        (b"{", 400, "expected a JSON object"),
        (b"\xff", 400, "expected a JSON object"),
        (b"[" * 100_000, 400, "expected a JSON object"),
        ({}, 400, "exactly one of 'prompt' and 'messages'"),
        ({"prompt": " "}, 400, "the prompt is empty"),
        ({"prompt": "hi", "mode": "psychic"}, 400, "mode"),
        ({"prompt": "hi", "stream": False, "trace": True}, 400, "'stream' true with 'trace'"),
        ({"prompt": "hi", "n": 2}, 400, "'stream' false with 'n' 2"),
        ({"prompt": "x" * (300 << 10)}, 413, "send a shorter prompt"),
        ({"prompt": "hi", "max_new_tokens": 90_000}, 400, "refused"),
    ],
)
def test_bad_prompts_are_refused(
    server: PromptServer, body: object, status: int, says: str
) -> None:
    actual, message = error_of(ask(server, body))
    assert (actual, says in message) == (status, True), message


def test_an_unknown_device_is_offline(server: PromptServer) -> None:
    status, message = error_of(ask(server, device="oven"))
    assert (status, "oven is offline or unknown" in message) == (503, True)
    assert error_of(ask(server, device="a%2Fb%2B"))[0] == 400


@dataclass
class SlowDevice:
    """A device that answers with `replies` at once, and then with nothing more."""

    fleet: MemoryFleet
    name: str
    replies: tuple[bytes, ...] = (b'{"seq":0,"text":"a"}',)
    cancelled: queue.Queue[str] = field(default_factory=queue.Queue)

    def start(self, prompts: OperatorPrompts) -> None:
        watcher = self.fleet.watcher
        watcher.subscribe(topics.device_prompt(self.name, "+", "+"), self._reply)
        watcher.subscribe(topics.device_cancel(self.name, "+", "+"), self._cancel)
        self.set_online(is_online=True)
        wait_until(lambda: prompts.is_online(self.name), "the device is online")

    def set_online(self, *, is_online: bool) -> None:
        status = DeviceStatus(online=is_online, epoch=1, bundle_id="b", version="1", mode="auto")
        topic = topics.device_status(self.name)
        self.fleet.watcher.publish(topic, msgspec.json.encode(status), retain=True)

    def _reply(self, topic: str, _: bytes) -> None:
        app, request = topics.parse_topic(topic, topics.PROMPT_FILTER)[1:]
        for payload in self.replies:
            self.fleet.watcher.publish(topics.device_reply(self.name, app, request), payload)

    def _cancel(self, topic: str, _: bytes) -> None:
        self.cancelled.put(topic)


@pytest.fixture
def slow(fleet: MemoryFleet, prompts: OperatorPrompts) -> Iterator[SlowDevice]:
    device = SlowDevice(fleet, "slow")
    device.start(prompts)
    yield device
    device.set_online(is_online=False)


def test_an_answer_ends_when_its_reader_hangs_up(
    slow: SlowDevice, prompts: OperatorPrompts, server: PromptServer
) -> None:
    response = ask(server, device="slow")
    assert response.read(1)
    assert prompts.num_active == 1
    response.close()
    assert slow.cancelled.get(timeout=WAIT_S)
    wait_until(lambda: not prompts.num_active, "the server ends the answer")


def test_an_answer_ends_with_the_sign_in(slow: SlowDevice, server: PromptServer) -> None:
    response = ask(server, device="slow")
    assert response.read(1)
    server.is_signed_in = False
    _, problem = events_of(response)[-1]
    assert problem["code"] == "bad_credentials"
    assert slow.cancelled.get(timeout=WAIT_S)


def test_answers_in_progress_are_limited(
    slow: SlowDevice, prompts: OperatorPrompts, server: PromptServer
) -> None:
    mine = [ask(server, device="slow") for _ in range(2)]
    status, message = error_of(ask(server, device="slow"))
    assert (status, "you have 2 answers in progress" in message) == (429, True)
    other = ask(server, device="slow", role=OperatorRole.ADMIN)
    assert other.status == 200
    status, message = error_of(ask(server, device="slow", role=OperatorRole.ADMIN))
    assert (status, "operators have 3 answers" in message) == (429, True)
    for each in (*mine, other):
        each.close()
    for _ in range(3):
        assert slow.cancelled.get(timeout=WAIT_S)
    wait_until(lambda: not prompts.num_active, "the server ends the answers")


def test_an_answer_ends_when_its_device_goes_offline(
    slow: SlowDevice, server: PromptServer
) -> None:
    response = ask(server, device="slow")
    slow.set_online(is_online=False)
    name, problem = events_of(response)[-1]
    assert (name, problem["code"]) == ("problem", "offline")


def test_a_hostile_reply_is_dropped(
    fleet: MemoryFleet, prompts: OperatorPrompts, server: PromptServer
) -> None:
    """Replies with a trace of the wrong form never reach the reader."""
    hostile = (
        b'{"seq":0,"trace":{"at_ms":1,"events":[{"kind":"<b>","at_ms":1}]}}',
        b'{"seq":0,"trace":{"at_ms":1e300}}',
        b'{"seq":0,"trace":{"at_ms":1,"events":[{"kind":"lost","at_ms":1,"text":"%s"}]}}'
        % (b"x" * (1 << 20)),
        b'{"seq":0,"done":true,"text":"</b>"}',
    )
    device = SlowDevice(fleet, "hostile", hostile)
    device.start(prompts)
    events = events_of(ask(server, device="hostile"))
    assert events == [("reply", {"seq": 0, "text": "</b>", "done": True})]
    device.set_online(is_online=False)
