"""Calls of an HTTP API by the packages that people have: python client_calls.py URL MODEL KEY.

It runs in an environment of its own (requirements.txt) and prints one JSON object: for each call
its name with the value that it returned, or with ``{"error": ..., "status": ..., "text": ...}``.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

URL, MODEL, KEY = sys.argv[1:]
BASE = f"{URL}/v1"
TOKENS = 8
PROMPT = "Name a river."
MESSAGES = [{"role": "user", "content": PROMPT}]
RESULTS: dict[str, Any] = {}

# Both look for files of a person or for the network while they are imported.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
folder = Path(tempfile.mkdtemp())
os.environ["LLM_USER_PATH"] = str(folder)
(folder / "extra-openai-models.yaml").write_text(
    json.dumps(
        [{"model_id": "device", "model_name": MODEL, "api_base": BASE, "api_key_name": "device"}]
    )
)
(folder / "keys.json").write_text(json.dumps({"device": KEY}))

import litellm  # noqa: E402
import llm  # noqa: E402
import ollama  # noqa: E402
import openai  # noqa: E402
import pydantic  # noqa: E402
from langchain_ollama import ChatOllama, OllamaLLM  # noqa: E402
from langchain_openai import ChatOpenAI  # noqa: E402
from langchain_openai import OpenAI as LangchainOpenAI  # noqa: E402

openai_client = openai.OpenAI(base_url=BASE, api_key=KEY, max_retries=0)
ollama_client = ollama.Client(host=URL, headers={"Authorization": f"Bearer {KEY}"})


class Verdict(pydantic.BaseModel):
    """An answer of a given form."""

    ok: bool


def call(function: Callable[[], Any]) -> Callable[[], Any]:
    """Run a function at once and keep its value, or its error."""
    try:
        RESULTS[function.__name__] = function()
    except Exception as error:  # noqa: BLE001
        RESULTS[function.__name__] = {
            "error": type(error).__name__,
            "status": getattr(error, "status_code", None),
            "code": getattr(error, "code", None),
            "param": getattr(error, "param", None),
            "text": str(error),
        }
    return function


def chat(**options: Any) -> Any:
    """A chat completion of the package openai."""
    given = {"model": MODEL, "messages": MESSAGES, "max_tokens": TOKENS, "temperature": 0}
    return openai_client.chat.completions.create(**(given | options))


def respond(**options: Any) -> Any:
    """A response of the package openai."""
    given = {"model": MODEL, "input": PROMPT, "max_output_tokens": TOKENS, "temperature": 0}
    return openai_client.responses.create(**(given | options))


def ollama_chat(**options: Any) -> Any:
    """A chat of the package ollama."""
    limits = {"num_predict": TOKENS, "temperature": 0}
    given = {"model": MODEL, "messages": MESSAGES, "options": limits}
    return ollama_client.chat(**(given | options))


@call
def openai_chat() -> Any:
    return chat().choices[0].message.content


@call
def openai_chat_object() -> Any:
    return chat().model_dump()


@call
def openai_chat_of_parts() -> Any:
    parts = [{"type": "text", "text": "Name a"}, {"type": "text", "text": "river."}]
    whole = chat(messages=[{"role": "user", "content": "Name a\nriver."}])
    return [
        chat(messages=[{"role": "user", "content": parts}]).choices[0].message.content,
        whole.choices[0].message.content,
    ]


@call
def openai_chat_with_newer_limit() -> Any:
    return chat(max_tokens=None, max_completion_tokens=TOKENS).choices[0].message.content


@call
def openai_parsed() -> Any:
    given = {"model": MODEL, "messages": MESSAGES, "max_tokens": 40, "temperature": 0}
    chat_answer = openai_client.chat.completions.parse(**given, response_format=Verdict)
    answer = openai_client.responses.parse(
        model=MODEL, input=PROMPT, max_output_tokens=40, temperature=0, text_format=Verdict
    )
    return [chat_answer.choices[0].message.parsed.ok, answer.output_parsed.ok]


@call
def openai_stream() -> Any:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chat(stream=True))


@call
def openai_stream_chunks() -> Any:
    options = {"include_usage": True}
    return [chunk.model_dump() for chunk in chat(stream=True, stream_options=options)]


@call
def openai_async_stream() -> Any:
    async def collect() -> str:
        client = openai.AsyncOpenAI(base_url=BASE, api_key=KEY, max_retries=0)
        stream = await client.chat.completions.create(
            model=MODEL, messages=MESSAGES, max_tokens=TOKENS, temperature=0, stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    return asyncio.run(collect())


@call
def openai_completion() -> Any:
    options = {"model": MODEL, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
    chunks = openai_client.completions.create(**options, stream=True)
    return [
        openai_client.completions.create(**options).choices[0].text,
        "".join(chunk.choices[0].text for chunk in chunks),
    ]


@call
def openai_response() -> Any:
    return respond().output_text


@call
def openai_response_object() -> Any:
    return respond(instructions="Be short.").model_dump()


@call
def openai_response_events() -> Any:
    message = {"role": "user", "content": [{"type": "input_text", "text": PROMPT}]}
    return [event.model_dump() for event in respond(input=[message], stream=True)]


@call
def openai_models() -> Any:
    return [
        [model.id for model in openai_client.models.list()],
        openai_client.models.retrieve(MODEL).id,
    ]


@call
def openai_unknown_model() -> Any:
    return chat(model="gpt-4o")


@call
def openai_unknown_model_in_a_stream() -> Any:
    return list(chat(model="gpt-4o", stream=True))


@call
def openai_unknown_model_of_a_response() -> Any:
    return respond(model="gpt-4o")


@call
def openai_image() -> Any:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    return chat(messages=[{"role": "user", "content": [part]}])


@call
def openai_image_of_a_response() -> Any:
    part = {"type": "input_image", "image_url": "data:image/png;base64,AAAA"}
    return respond(input=[{"role": "user", "content": [part]}])


@call
def openai_tools() -> Any:
    function = {"name": "look", "parameters": {"type": "object", "properties": {}}}
    return chat(tools=[{"type": "function", "function": function}])


@call
def openai_previous_response() -> Any:
    return respond(previous_response_id="resp_1")


@call
def openai_logprobs() -> Any:
    choice = chat(logprobs=True, top_logprobs=2).choices[0]
    return [[each.token, len(each.top_logprobs)] for each in choice.logprobs.content]


@call
def openai_several_answers() -> Any:
    completion = chat(n=2, temperature=1, seed=3)
    alone = [chat(temperature=1, seed=3 + i).choices[0].message.content for i in range(2)]
    return [[choice.message.content for choice in completion.choices], alone]


@call
def openai_stop() -> Any:
    text = chat().choices[0].message.content
    choice = chat(stop=[text[4:6]]).choices[0]
    return [text, choice.message.content, choice.finish_reason]


@call
def openai_several_answers_in_a_stream() -> Any:
    return chat(n=2, stream=True)


@call
def openai_wrong_key() -> Any:
    client = openai.OpenAI(base_url=BASE, api_key="wrong", max_retries=0)
    return client.models.list().data[0].id


@call
def ollama_chat_text() -> Any:
    return ollama_chat().message.content


@call
def ollama_chat_object() -> Any:
    return ollama_chat().model_dump()


@call
def ollama_logprobs() -> Any:
    return [len(each.top_logprobs) for each in ollama_chat(logprobs=True, top_logprobs=2).logprobs]


@call
def ollama_stream() -> Any:
    return "".join(line.message.content for line in ollama_chat(stream=True))


@call
def ollama_generate() -> Any:
    options = {"num_predict": TOKENS, "temperature": 0}
    lines = ollama_client.generate(MODEL, PROMPT, options=options, stream=True)
    return [
        ollama_client.generate(MODEL, PROMPT, options=options).response,
        "".join(line.response for line in lines),
    ]


@call
def ollama_raw() -> Any:
    options = {"num_predict": TOKENS, "temperature": 0}
    return ollama_client.generate(MODEL, PROMPT, options=options, raw=True).response


@call
def ollama_load() -> Any:
    return ollama_client.generate(MODEL).done_reason


@call
def ollama_lists() -> Any:
    shown = ollama_client.show(MODEL)
    return [
        [model.model for model in ollama_client.list().models],
        [model.model for model in ollama_client.ps().models],
        shown.capabilities,
        shown.details.family,
    ]


@call
def ollama_latest_tag() -> Any:
    return ollama_chat(model=f"{MODEL}:latest").message.content


@call
def ollama_unknown_model() -> Any:
    return ollama_chat(model="llama3")


@call
def ollama_image() -> Any:
    return ollama_chat(messages=[{"role": "user", "content": "See", "images": [b"AAAA"]}])


@call
def ollama_tools() -> Any:
    function = {"name": "look", "description": "", "parameters": {"type": "object"}}
    return ollama_chat(tools=[{"type": "function", "function": function}])


@call
def home_assistant() -> Any:
    """The calls of Home Assistant's Ollama integration: the list of models, then streamed turns."""

    async def converse() -> Any:
        client = ollama.AsyncClient(host=URL, headers={"Authorization": f"Bearer {KEY}"})
        names = [model["model"] for model in (await client.list())["models"]]
        messages = [
            ollama.Message(role="system", content="You are a voice assistant."),
            ollama.Message(role="user", content="Hello"),
            ollama.Message(role="assistant", content="Hi!"),
            ollama.Message(role="user", content=PROMPT),
        ]
        lines = await client.chat(
            model=names[0],
            messages=list(messages),
            tools=None,
            stream=True,
            keep_alive=-1,
            options={"num_ctx": 8192, "num_predict": TOKENS},
            think=False,
            format=None,
        )
        return [[line["message"].get("content"), line.get("done")] async for line in lines]

    return asyncio.run(converse())


def chat_openai(**options: Any) -> ChatOpenAI:
    """The model of langchain-openai."""
    return ChatOpenAI(
        model=MODEL, base_url=BASE, api_key=KEY, max_tokens=TOKENS, temperature=0, **options
    )


def chat_ollama() -> ChatOllama:
    """The model of langchain-ollama."""
    return ChatOllama(
        model=MODEL,
        base_url=URL,
        num_predict=TOKENS,
        temperature=0,
        validate_model_on_init=True,
        client_kwargs={"headers": {"Authorization": f"Bearer {KEY}"}},
    )


@call
def langchain_openai() -> Any:
    return chat_openai().invoke(PROMPT).content


@call
def langchain_openai_stream() -> Any:
    chunks = list(chat_openai(stream_usage=True).stream(PROMPT))
    usage = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]
    return ["".join(str(chunk.content) for chunk in chunks), usage[0]["output_tokens"]]


@call
def langchain_openai_responses() -> Any:
    model = chat_openai(use_responses_api=True)
    return [model.invoke(PROMPT).text, "".join(chunk.text for chunk in model.stream(PROMPT))]


@call
def langchain_openai_completion() -> Any:
    model = LangchainOpenAI(
        model=MODEL, base_url=BASE, api_key=KEY, max_tokens=TOKENS, temperature=0
    )
    return model.invoke(PROMPT)


@call
def langchain_ollama() -> Any:
    answer = chat_ollama().invoke(PROMPT)
    return [answer.content, answer.usage_metadata["output_tokens"]]


@call
def langchain_ollama_stream() -> Any:
    return "".join(str(chunk.content) for chunk in chat_ollama().stream(PROMPT))


@call
def langchain_ollama_generate() -> Any:
    headers = {"headers": {"Authorization": f"Bearer {KEY}"}}
    model = OllamaLLM(
        model=MODEL, base_url=URL, num_predict=TOKENS, temperature=0, client_kwargs=headers
    )
    return model.invoke(PROMPT)


def complete(provider: str, base: str, **options: Any) -> Any:
    """A completion of litellm."""
    return litellm.completion(
        model=f"{provider}/{MODEL}",
        messages=MESSAGES,
        api_base=base,
        api_key=KEY,
        max_tokens=TOKENS,
        temperature=0,
        **options,
    )


def joined(chunks: Any) -> str:
    """The text of a stream of litellm."""
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


@call
def litellm_openai() -> Any:
    return complete("openai", BASE).choices[0].message.content


@call
def litellm_openai_stream() -> Any:
    return joined(complete("openai", BASE, stream=True))


@call
def litellm_ollama() -> Any:
    return complete("ollama_chat", URL).choices[0].message.content


@call
def litellm_ollama_stream() -> Any:
    return joined(complete("ollama_chat", URL, stream=True))


@call
def llm_prompt() -> Any:
    model = llm.get_model("device")
    options = {"max_tokens": TOKENS, "temperature": 0}
    return [
        model.prompt(PROMPT, stream=False, **options).text(),
        "".join(model.prompt(PROMPT, **options)),
    ]


print(json.dumps(RESULTS, default=str))
