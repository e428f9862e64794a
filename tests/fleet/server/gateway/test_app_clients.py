"""The clients of apps: a limited number of subscriptions, none of which is dropped in use."""

from __future__ import annotations

import asyncio

import pytest

from fleet.errors import BusyError
from fleet.protocol import topics
from fleet.protocol.prompt import PromptRequest
from fleet.server.gateway.app_clients import AppClients
from fleet.transport.in_memory import InMemoryBroker
from tests.brokers import Inbox

PROMPT = PromptRequest(prompt="hello")


def test_an_idle_client_makes_room_for_another_app_and_a_busy_one_does_not() -> None:
    async def work() -> None:
        clients = AppClients(link, max_apps=2)
        first = await clients.client_of("one")
        await clients.client_of("two")
        assert await clients.client_of("one") is first
        await clients.client_of("three")  # instead of "two", which was used longest ago
        assert await clients.client_of("one") is first
        with first.ask("kitchen", PROMPT):
            await clients.client_of("four")
            assert await clients.client_of("one") is first
            fourth = await clients.client_of("four")
            with fourth.ask("kitchen", PROMPT), pytest.raises(BusyError, match="2 apps"):
                await clients.client_of("five")
        await clients.client_of("five")
        clients.close()

    with InMemoryBroker().connect("http-api") as link:
        asyncio.run(work())


def test_two_first_requests_of_an_app_share_one_client() -> None:
    async def work() -> None:
        clients = AppClients(link)
        one, other = await asyncio.gather(clients.client_of("one"), clients.client_of("one"))
        assert one is other
        clients.close()

    with InMemoryBroker().connect("http-api") as link:
        asyncio.run(work())


def test_a_request_is_sent_again_when_the_link_is_back() -> None:
    prompts = Inbox()

    async def work() -> None:
        client = await AppClients(link).client_of("phone")
        with client.ask("kitchen", PROMPT):
            first = await asyncio.to_thread(prompts.get)
            link.drop()
            link.restore()
            assert await asyncio.to_thread(prompts.get) == first

    broker = InMemoryBroker()
    with broker.connect("http-api") as link, broker.connect("kitchen") as kitchen:
        kitchen.subscribe(topics.prompts_to("kitchen"), prompts, qos=1)
        asyncio.run(work())
