"""The replies of one request on an event loop: in order, each once, and errors at once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import pytest

from fleet.errors import AccessError, FleetError, LinkError, RefusedPromptError, TopicError
from fleet.protocol import topics
from fleet.protocol.prompt import ErrorInfo, PromptRequest, Reply
from fleet.transport import async_prompt_client
from fleet.transport.async_prompt_client import AsyncPromptClient, AsyncReplyStream
from fleet.transport.in_memory import InMemoryBroker
from tests.brokers import Inbox

PROMPT = PromptRequest(prompt="hello")
FIRST = Reply(seq=0, text="a", generation="g")
SECOND = Reply(seq=1, text="b")
LAST = Reply(seq=2, text="c", done=True)
REFUSED = Reply(seq=0, done=True, error=ErrorInfo("busy", "full"))


class Exchange:
    """A client of an app over a gateway's link, and the messages that a device gets."""

    def __init__(self) -> None:
        broker = InMemoryBroker()
        self.gateway = broker.connect("http-api")
        self.device = broker.connect("kitchen")
        self.prompts = Inbox()
        self.cancelled = Inbox()
        self.device.subscribe(topics.prompts_to("kitchen"), self.prompts, qos=1)
        self.device.subscribe(topics.cancels_to("kitchen"), self.cancelled, qos=1)
        self.client = AsyncPromptClient(self.gateway, "phone")
        self.client.open()

    def close(self) -> None:
        self.client.close()
        self.gateway.close()
        self.device.close()

    def run(self, work: Callable[[AsyncReplyStream], Awaitable[object]]) -> None:
        async def run() -> None:
            with self.client.ask("kitchen", PROMPT) as stream:
                await work(stream)

        asyncio.run(run())


@pytest.fixture
def exchange() -> Exchange:
    return Exchange()


async def read(stream: AsyncReplyStream) -> str:
    text = ""
    while not stream.is_done:
        text += (await stream.next()).text
    return text


@pytest.mark.parametrize(
    "arrived",
    [
        (FIRST, SECOND, LAST),
        (LAST, SECOND, FIRST),
        (FIRST, FIRST, SECOND, FIRST, LAST),
    ],
)
def test_replies_come_once_and_in_order(exchange: Exchange, arrived: Sequence[Reply]) -> None:
    async def work(stream: AsyncReplyStream) -> None:
        for reply in arrived:
            stream.put(reply)
        assert await read(stream) == "abc"

    exchange.run(work)
    assert exchange.client.is_idle
    assert exchange.cancelled.is_empty
    exchange.close()


def test_the_prompt_is_the_apps_and_is_cancelled_at_the_end_of_the_block(
    exchange: Exchange,
) -> None:
    async def work(stream: AsyncReplyStream) -> None:
        stream.put(FIRST)
        assert (await stream.next()).text == "a"

    exchange.run(work)
    topic, _ = exchange.prompts.get()
    assert topic.startswith("ce/v1/d/kitchen/prompt/phone/")
    assert exchange.cancelled.get()[0] == topic.replace("/prompt/", "/cancel/")
    exchange.close()


async def fail_from_outside(stream: AsyncReplyStream) -> None:
    stream.put(FIRST)
    stream.fail(AccessError("no more"))
    await stream.next()


async def restart(stream: AsyncReplyStream) -> None:
    stream.put(FIRST)
    stream.put(Reply(seq=1, generation="another"))
    await read(stream)


async def refuse(stream: AsyncReplyStream) -> None:
    stream.put(REFUSED)
    await stream.next()


async def be_silent(stream: AsyncReplyStream) -> None:
    await stream.next(0.001)


@pytest.mark.parametrize(
    ("work", "kind", "words"),
    [
        (fail_from_outside, AccessError, "no more"),
        (restart, LinkError, "has restarted"),
        (refuse, RefusedPromptError, r"kitchen refused \(busy\): full"),
        (be_silent, LinkError, "kitchen did not respond"),
    ],
)
def test_an_answer_that_cannot_go_on_raises(
    exchange: Exchange,
    work: Callable[[AsyncReplyStream], Awaitable[object]],
    kind: type[FleetError],
    words: str,
) -> None:
    with pytest.raises(kind, match=words):
        exchange.run(work)
    assert exchange.client.is_idle
    exchange.close()


def test_a_request_without_a_reply_is_sent_again(
    exchange: Exchange, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(async_prompt_client, "REPEAT_S", 0.001)

    async def work(stream: AsyncReplyStream) -> None:
        waiting = asyncio.create_task(stream.next())
        first = await asyncio.to_thread(exchange.prompts.get)
        assert await asyncio.to_thread(exchange.prompts.get) == first
        stream.put(FIRST)
        await waiting

    exchange.run(work)
    exchange.close()


def test_a_device_needs_a_legal_name(exchange: Exchange) -> None:
    async def run() -> None:
        with exchange.client.ask("Kitchen/#", PROMPT):
            pass

    with pytest.raises(TopicError):
        asyncio.run(run())
    assert exchange.client.is_idle
    exchange.close()
