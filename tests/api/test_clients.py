"""The packages that people use as clients, against a device without a broker."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from edge_agent.config import AgentConfig
from fleet.bundles.manifest import Bundle
from fleet.protocol.prompt import ChatMessage, PromptRequest
from tests.api.device_api import DeviceApi, device_api
from tests.api.environment import call_clients
from tests.api.environment import client_python as client_python  # a fixture
from tests.packaging.environments import ROOT, run

pytestmark = [pytest.mark.packaging, pytest.mark.timeout(600)]

KEY: Final = "0123456789abcdef"
MODEL: Final = "tiny"
PROMPT: Final = "Name a river."
TOKENS: Final = 8
EXAMPLES: Final = ROOT / "examples"

Values = dict[str, Any]


@pytest.fixture(scope="module")
def expected(tiny_bundle: Bundle) -> dict[str, str]:
    """The texts that an app gets over MQTT: of a chat, and of a raw prompt."""
    chat = PromptRequest(messages=(ChatMessage("user", PROMPT),), max_new_tokens=TOKENS)
    raw = PromptRequest(prompt=PROMPT, raw=True, max_new_tokens=TOKENS)
    with device_api(tiny_bundle) as device:
        return {"chat": device.text_over_mqtt(chat), "raw": device.text_over_mqtt(raw)}


@pytest.fixture(scope="module")
def device(tiny_bundle: Bundle) -> Iterator[DeviceApi]:
    """A device that has lost its broker and needs a key."""
    config = AgentConfig(num_threads=1, max_new_tokens=TOKENS)
    with device_api(tiny_bundle, config, key=KEY) as running:
        running.transport.drop()
        yield running


@pytest.fixture(scope="module")
def values(device: DeviceApi, client_python: Path) -> Values:
    """The values of all calls."""
    return call_clients(client_python, device.url, MODEL, KEY)


@pytest.fixture(scope="module")
def variables(device: DeviceApi) -> dict[str, str]:
    """The variables that the examples read."""
    own = {"OPENAI_BASE_URL": f"{device.url}/v1", "OPENAI_API_KEY": KEY}
    return own | {"PYTHONPATH": "", "PYTHONWARNINGS": "ignore"}


def test_the_example_of_openai_prints_an_answer_and_its_sources(
    client_python: Path, variables: dict[str, str], expected: dict[str, str]
) -> None:
    example = (client_python, EXAMPLES / "openai_client.py", MODEL, PROMPT)
    printed = run(*example, folder=client_python.parent, variables=variables)
    assert printed == f"{expected['chat']}\n{{'fallback': {TOKENS}}}\n"


def test_the_example_of_langchain_prints_an_answer_to_each_line(
    device: DeviceApi, client_python: Path, variables: dict[str, str]
) -> None:
    example = (client_python, EXAMPLES / "langchain_chat.py", MODEL)
    text = "Name a river.\nAnd a lake.\n"
    printed = run(*example, folder=client_python.parent, variables=variables, text=text)
    answers: list[str] = []
    turns = [{"role": "system", "content": "Answer in one short sentence."}]
    for line in text.splitlines():
        turns.append({"role": "user", "content": line})
        body = {"model": MODEL, "messages": turns, "max_tokens": 64}
        answer = device.post("/v1/chat/completions", body).json()
        answers.append(answer["choices"][0]["message"]["content"])
        turns.append({"role": "assistant", "content": answers[-1]})
    assert printed == "".join(f"{answer}\n" for answer in answers)


@pytest.mark.parametrize("name", ["openapi.json", "operator-api.json"])
def test_the_description_of_an_api_is_valid(client_python: Path, name: str) -> None:
    """As openapi-spec-validator checks it: the form of OpenAPI 3.1, references and defaults."""
    document = ROOT / "docs" / name
    printed = run(client_python, "-m", "openapi_spec_validator", document, folder=ROOT)
    assert printed.strip().endswith("OK")


@pytest.mark.parametrize(
    "name",
    [
        "openai_chat",
        "openai_chat_with_newer_limit",
        "openai_stream",
        "openai_async_stream",
        "openai_response",
        "ollama_chat_text",
        "ollama_stream",
        "ollama_generate",
        "ollama_latest_tag",
        "langchain_openai",
        "langchain_openai_responses",
        "langchain_ollama_stream",
        "langchain_ollama_generate",
        "litellm_openai",
        "litellm_openai_stream",
        "litellm_ollama",
        "litellm_ollama_stream",
        "llm_prompt",
    ],
)
def test_a_client_gets_the_text_that_an_app_gets_over_mqtt(
    name: str, values: Values, expected: dict[str, str]
) -> None:
    value = values[name]
    texts = value if isinstance(value, list) else [value]
    assert texts == [expected["chat"]] * len(texts)


@pytest.mark.parametrize("name", ["openai_completion", "ollama_raw", "langchain_openai_completion"])
def test_a_completion_continues_its_text(
    name: str, values: Values, expected: dict[str, str]
) -> None:
    value = values[name]
    texts = value if isinstance(value, list) else [value]
    assert texts == [expected["raw"]] * len(texts)


def test_parts_of_a_message_are_its_lines(values: Values) -> None:
    parts, whole = values["openai_chat_of_parts"]
    assert parts == whole


def test_a_completion_has_the_counts_of_the_fleet_and_the_times_of_llama_cpp(
    values: Values,
) -> None:
    completion = values["openai_chat_object"]
    counts = completion["fleet"]["counts"]
    usage = completion["usage"]
    assert usage["completion_tokens"] == counts["tokens"] == completion["timings"]["predicted_n"]
    assert usage["prompt_tokens"] == counts["prompt_tokens"] == completion["timings"]["prompt_n"]
    assert counts["sources"] == {"fallback": TOKENS}
    assert completion["choices"][0]["finish_reason"] == "length"


def test_every_chunk_of_a_stream_has_what_strict_clients_need(values: Values) -> None:
    *chunks, last, usage = values["openai_stream_chunks"]
    (identity,) = {(chunk["id"], chunk["object"], chunk["model"]) for chunk in (*chunks, last)}
    assert identity[1:] == ("chat.completion.chunk", MODEL)
    choices = [chunk["choices"][0] for chunk in (*chunks, last)]
    assert [choice["index"] for choice in choices] == [0] * len(choices)
    assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * len(chunks)
    assert choices[-1]["finish_reason"] == "length"
    assert choices[0]["delta"]["role"] == "assistant"
    assert [chunk["fleet"]["source"] for chunk in chunks[1:]] == ["fallback"] * TOKENS
    assert last["fleet"]["counts"]["tokens"] == TOKENS
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == TOKENS


def test_each_token_has_its_log_probability(values: Values) -> None:
    assert [top for _, top in values["openai_logprobs"]] == [2] * TOKENS
    assert values["ollama_logprobs"] == [2] * TOKENS


def test_an_answer_has_the_form_of_a_schema(values: Values) -> None:
    assert all(isinstance(ok, bool) for ok in values["openai_parsed"])


def test_several_answers_have_seeds_of_their_own(values: Values) -> None:
    together, alone = values["openai_several_answers"]
    assert together == alone
    assert together[0] != together[1]


def test_an_answer_ends_before_its_stop_text(values: Values) -> None:
    text, stopped, reason = values["openai_stop"]
    assert stopped == text[: text.index(text[4:6])]
    assert reason == "stop"


def test_the_events_of_a_response_come_in_the_order_of_openai(
    values: Values, expected: dict[str, str]
) -> None:
    events = values["openai_response_events"]
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert [event["type"] for event in events if event not in deltas] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert "".join(event["delta"] for event in deltas) == expected["chat"]
    response = events[-1]["response"]
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert response["output"][0]["content"][0]["text"] == expected["chat"]


def test_a_response_has_counts_and_instructions(values: Values) -> None:
    response = values["openai_response_object"]
    assert response["usage"]["output_tokens"] == TOKENS
    assert response["instructions"] == "Be short."
    assert response["store"] is False


def test_clients_find_the_model(values: Values) -> None:
    assert values["openai_models"] == [[MODEL], MODEL]
    assert values["ollama_lists"] == [[MODEL], [MODEL], ["completion"], "llama"]
    assert values["ollama_load"] == "load"


def test_a_chat_of_ollama_has_counts_and_times(values: Values) -> None:
    line = values["ollama_chat_object"]
    assert line["done_reason"] == "length"
    assert line["eval_count"] == TOKENS
    assert line["total_duration"] == line["prompt_eval_duration"] + line["eval_duration"]


def test_home_assistant_gets_its_streamed_turn(values: Values) -> None:
    *lines, last = values["home_assistant"]
    assert [done for _, done in lines] == [False] * TOKENS
    assert last[1] is True


@pytest.mark.parametrize("name", ["langchain_openai_stream", "langchain_ollama"])
def test_langchain_counts_the_tokens(name: str, values: Values, expected: dict[str, str]) -> None:
    assert values[name] == [expected["chat"], TOKENS]


def not_found(error: Values) -> bool:
    return error["status"] == 404 and "not found: this device serves 'tiny'" in error["text"]


def refused(field: str) -> Callable[[Values], bool]:
    return lambda error: error["status"] == 400 and f"{field}: it is not supported" in error["text"]


@pytest.mark.parametrize(
    ("name", "is_right"),
    [
        ("openai_unknown_model", not_found),
        ("openai_unknown_model_in_a_stream", not_found),
        ("openai_unknown_model_of_a_response", not_found),
        ("ollama_unknown_model", not_found),
        ("openai_image", refused("messages[0].content[0].image_url")),
        ("openai_image_of_a_response", refused("input[0].content[0].input_image")),
        ("openai_tools", refused("tools")),
        ("openai_several_answers_in_a_stream", lambda error: error["param"] == "n"),
        ("openai_previous_response", refused("previous_response_id")),
        ("ollama_image", refused("messages[0].images")),
        ("ollama_tools", refused("tools")),
        ("openai_wrong_key", lambda error: error["error"] == "AuthenticationError"),
    ],
)
def test_a_client_gets_the_error_of_its_api(
    name: str, is_right: Callable[[Values], bool], values: Values
) -> None:
    assert is_right(values[name]), values[name]


def test_the_errors_of_openai_name_the_field_and_the_code(values: Values) -> None:
    assert values["openai_unknown_model"]["error"] == "NotFoundError"
    assert values["openai_unknown_model"]["code"] == "model_not_found"
    assert values["openai_unknown_model"]["param"] == "model"
    assert values["openai_tools"]["error"] == "BadRequestError"
    assert values["openai_tools"]["param"] == "tools"
