"""The fleet's HTTP API on real brokers with TLS: an app with a key and without a certificate."""

from __future__ import annotations

import asyncio
import ssl
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from edge_agent.config import AgentConfig
from edge_agent.serving.agent import Agent
from fleet.bundles.manifest import Bundle
from fleet.http_api.api_address import ApiAddress
from fleet.http_api.api_server import ApiServer
from fleet.protocol import topics
from fleet.protocol.access import Grants, Role
from fleet.server.gateway.api_gateway import start_api
from fleet.server.gateway.api_options import ApiOptions
from fleet.transport.base import Will
from tests.brokers import HOST, wait_until
from tests.fleet.server.gateway.api_fleet import WAIT_S, chat
from tests.registered import RegisteredSite, registered_site

FLEET = (Grants(Role.DEVICE, "kitchen"), Grants(Role.GATEWAY, "http-api"))
KINDS = ["embedded", pytest.param("mosquitto", marks=pytest.mark.mosquitto)]


def start_agent(stack: ExitStack, site: RegisteredSite, bundle: Bundle) -> None:
    will = Will(topics.device_status("kitchen"), Agent.will())
    link = stack.enter_context(site.connect("kitchen", will))
    stack.enter_context(Agent(link, bundle, AgentConfig(num_threads=1)))


def ask(server: ApiServer, site: RegisteredSite, key: str) -> tuple[int, Any]:
    context = ssl.create_default_context(cadata=site.authority.pem)

    async def run() -> tuple[int, Any]:
        body = chat("fleet", max_tokens=4, fleet={"mode": "standalone", "ignore_eos": True})
        headers = {"Authorization": f"Bearer {key}"}
        timeout = aiohttp.ClientTimeout(total=WAIT_S)
        async with (
            aiohttp.ClientSession(server.url, timeout=timeout) as session,
            session.post("/v1/chat/completions", json=body, headers=headers, ssl=context) as reply,
        ):
            return reply.status, await reply.json()

    return asyncio.run(run())


@pytest.mark.parametrize("kind", KINDS)
def test_a_key_is_enough_for_an_app_and_works_until_it_is_revoked(
    tmp_path: Path, tiny_bundle: Bundle, kind: str
) -> None:
    with registered_site(kind, tmp_path, FLEET) as site, ExitStack() as stack:
        options = ApiOptions(
            address=ApiAddress(HOST, 0), cert_file=site.tls.cert_file, key_file=site.tls.key_file
        )
        link = stack.enter_context(site.connect("http-api"))
        server = start_api(stack, link, site.registry, site.watcher, options, site.tls)
        start_agent(stack, site, tiny_bundle)
        key = site.registry.api_keys.create("notebook", ["kitchen"])
        wait_until(lambda: ask(server, site, str(key))[0] == 200, "an answer")
        status, body = ask(server, site, str(key))
        assert status == 200
        assert body["usage"]["completion_tokens"] == 4
        site.registry.api_keys.revoke(key.id)
        wait_until(lambda: ask(server, site, str(key))[0] == 401, "a refusal")
