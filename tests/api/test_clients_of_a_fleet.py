"""The packages that people use as clients, against a whole fleet on each broker."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import pytest

from edge_agent.config import AgentConfig
from edge_agent.serving.agent import Agent
from fleet.bundles.manifest import Bundle
from fleet.http_api.api_address import ApiAddress
from fleet.protocol import topics
from fleet.protocol.access import Grants, Role
from fleet.protocol.prompt import ChatMessage, PromptRequest
from fleet.server.gateway.api_gateway import start_api
from fleet.server.gateway.api_options import ApiOptions
from fleet.transport.base import Will
from fleet.transport.prompt_client import PromptClient
from tests.api.environment import call_clients
from tests.api.environment import client_python as client_python  # a fixture
from tests.brokers import HOST
from tests.registered import registered_site

pytestmark = [pytest.mark.packaging, pytest.mark.timeout(600)]

DEVICES: Final = ("attic", "kitchen")
FLEET: Final = (
    *(Grants(Role.DEVICE, device) for device in DEVICES),
    Grants(Role.APP, "phone", DEVICES),
    Grants(Role.GATEWAY, "http-api"),
)
PROMPT: Final = PromptRequest(messages=(ChatMessage("user", "Name a river."),), max_new_tokens=8)
CHATS: Final = (
    "openai_chat",
    "openai_stream",
    "openai_async_stream",
    "openai_response",
    "ollama_chat_text",
    "ollama_stream",
    "ollama_generate",
    "ollama_latest_tag",
    "langchain_openai",
    "langchain_ollama_stream",
    "litellm_openai_stream",
    "litellm_ollama_stream",
    "llm_prompt",
)


@pytest.fixture(
    scope="module", params=["embedded", pytest.param("mosquitto", marks=pytest.mark.mosquitto)]
)
def values(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_bundle: Bundle,
    client_python: Path,
) -> Iterator[dict[str, Any]]:
    """The values of all calls with the model `fleet`, and the text over MQTT as `mqtt`."""
    folder = tmp_path_factory.mktemp("fleet")
    with registered_site(request.param, folder, FLEET) as site, ExitStack() as stack:
        for device in DEVICES:
            will = Will(topics.device_status(device), Agent.will())
            link = stack.enter_context(site.connect(device, will))
            stack.enter_context(Agent(link, tiny_bundle, AgentConfig(num_threads=1)))
        app = PromptClient(stack.enter_context(site.connect("phone")))
        text = "".join(reply.text for reply in app.ask("kitchen", PROMPT))
        gateway = stack.enter_context(site.connect("http-api"))
        options = ApiOptions(address=ApiAddress(HOST, 0))
        api = start_api(stack, gateway, site.registry, site.watcher, options, site.tls)
        key = str(site.registry.api_keys.create("phone"))
        yield call_clients(client_python, api.url, "fleet", key) | {"mqtt": text}


@pytest.mark.parametrize("name", CHATS)
def test_a_client_gets_the_text_that_an_app_gets_over_mqtt(
    name: str, values: dict[str, Any]
) -> None:
    value = values[name]
    texts = value if isinstance(value, list) else [value]
    assert texts == [values["mqtt"]] * len(texts)


def test_clients_find_the_names_of_the_fleet(values: dict[str, Any]) -> None:
    names = ["fleet", *DEVICES]
    assert values["openai_models"] == [names, "fleet"]
    assert values["ollama_lists"][0] == names


@pytest.mark.parametrize(
    ("name", "error", "status"),
    [
        ("openai_unknown_model", "NotFoundError", 404),
        ("openai_unknown_model_in_a_stream", "NotFoundError", 404),
        ("ollama_unknown_model", "ResponseError", 404),
        ("openai_wrong_key", "AuthenticationError", 401),
    ],
)
def test_a_client_gets_the_error_of_its_api(
    name: str, error: str, status: int, values: dict[str, Any]
) -> None:
    assert (values[name]["error"], values[name]["status"]) == (error, status)
