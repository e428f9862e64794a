"""Bodies of the APIs as prompts, and the fields that are refused."""

from __future__ import annotations

import json
from typing import Any, Final

import pytest

from fleet.errors import DecodeError, PromptError, RequestFieldError
from fleet.http_api.answer_writer import AnswerCall, ParseCall
from fleet.http_api.chat_completions import parse_chat_completion
from fleet.http_api.ollama_answers import parse_ollama_chat, parse_ollama_generate
from fleet.http_api.responses import parse_response
from fleet.http_api.text_completions import parse_text_completion
from fleet.protocol.constraint import JsonSchemaFormat, ResponseFormat
from fleet.protocol.modes import Mode
from fleet.protocol.prompt import ChatMessage, PromptRequest

USER: Final = {"role": "user", "content": "Hi"}
PART: Final = "messages[0].content[0]"
SCHEMA: Final = {"type": "object", "properties": {"ok": {"type": "boolean"}}}
JSON_SCHEMA: Final = ResponseFormat(type="json_schema", json_schema=JsonSchemaFormat(schema=SCHEMA))
USAGE: Final = "stream_options.include_usage"
HI: Final = (ChatMessage("user", "Hi"),)
ALL: Final = (
    parse_chat_completion,
    parse_text_completion,
    parse_response,
    parse_ollama_chat,
    parse_ollama_generate,
)


def parse(parse_call: ParseCall, body: dict[str, Any]) -> AnswerCall:
    return parse_call(json.dumps(body).encode())


def parts(*content: dict[str, Any]) -> dict[str, Any]:
    """The field `messages` with a message of parts."""
    return {"messages": [USER | {"content": list(content)}]}


def least(parse_call: ParseCall) -> dict[str, Any]:
    """The least body that an endpoint accepts."""
    if parse_call is parse_response:
        return {"model": "m", "input": "Hi"}
    if parse_call in (parse_text_completion, parse_ollama_generate):
        return {"model": "m", "prompt": "Hi"}
    return {"model": "m", "messages": [USER]}


@pytest.mark.parametrize(
    ("parse_call", "body", "prompt"),
    [
        (parse_chat_completion, {}, PromptRequest(messages=HI)),
        (
            parse_chat_completion,
            {"max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "seed": 7},
            PromptRequest(
                messages=HI, max_new_tokens=3, temperature=0.5, top_p=0.9, top_k=5, seed=7
            ),
        ),
        (parse_chat_completion, {"stop": "."}, PromptRequest(messages=HI, stop=(".",))),
        (
            parse_chat_completion,
            {"logprobs": True, "top_logprobs": 2, "logit_bias": {"5": -100}},
            PromptRequest(messages=HI, logprobs=True, top_logprobs=2, logit_bias={"5": -100.0}),
        ),
        (
            parse_chat_completion,
            {"presence_penalty": 1, "frequency_penalty": -1, "repetition_penalty": 1.1,
             "min_p": 0.1, "n": 2},
            PromptRequest(
                messages=HI, presence_penalty=1.0, frequency_penalty=-1.0, repetition_penalty=1.1,
                min_p=0.1, n=2, stream=False,
            ),
        ),
        (parse_text_completion, {"logprobs": 3},
         PromptRequest(prompt="Hi", raw=True, logprobs=True, top_logprobs=3)),
        (parse_response, {"include": ["message.output_text.logprobs"], "top_logprobs": 1},
         PromptRequest(messages=HI, logprobs=True, top_logprobs=1)),
        (parse_ollama_chat, {"logprobs": True, "options": {"repeat_penalty": 1.2, "min_p": 0.1}},
         PromptRequest(messages=HI, logprobs=True, repetition_penalty=1.2, min_p=0.1)),
        (parse_text_completion, {"stop": ["a", "b"]},
         PromptRequest(prompt="Hi", raw=True, stop=("a", "b"))),
        (parse_ollama_chat, {"options": {"stop": ["."]}},
         PromptRequest(messages=HI, stop=(".",))),
        (
            parse_chat_completion,
            {"max_tokens": 3, "max_completion_tokens": 4},
            PromptRequest(messages=HI, max_new_tokens=4),
        ),
        (
            parse_chat_completion,
            {"fleet": {"mode": "verified", "max_new_tokens": 5}},
            PromptRequest(messages=HI, mode=Mode.VERIFIED, max_new_tokens=5),
        ),
        (
            parse_chat_completion,
            {"user": "u", "store": True, "tools": [], "n": 1, "logprobs": False, "other": None},
            PromptRequest(messages=HI),
        ),
        (
            parse_chat_completion,
            {
                "messages": [
                    {"role": "developer", "content": [{"type": "text", "text": "Be short."}]},
                    {
                        "role": "assistant",
                        "content": None,
                        "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}],
                    },
                    {"role": "tool", "tool_call_id": "c", "content": "2"},
                ]
            },
            PromptRequest(
                messages=(
                    ChatMessage("system", "Be short."),
                    ChatMessage(
                        "assistant",
                        tool_calls=({"function": {"name": "f", "arguments": {"x": 1}}},),
                    ),
                    ChatMessage("tool", "2", tool_call_id="c"),
                )
            ),
        ),
        (parse_text_completion, {}, PromptRequest(prompt="Hi", raw=True)),
        (parse_text_completion, {"prompt": ["Hi"]}, PromptRequest(prompt="Hi", raw=True)),
        (
            parse_response,
            {"instructions": "Be short.", "max_output_tokens": 3},
            PromptRequest(messages=(ChatMessage("system", "Be short."), *HI), max_new_tokens=3),
        ),
        (
            parse_response,
            {"input": [{"type": "message", "role": "user", "content": [
                {"type": "input_text", "text": "Hi"}]}]},
            PromptRequest(messages=HI),
        ),
        (
            parse_ollama_chat,
            {"options": {"num_predict": 3, "top_k": 5, "num_ctx": 8192}, "keep_alive": "5m"},
            PromptRequest(messages=HI, max_new_tokens=3, top_k=5),
        ),
        (
            parse_ollama_chat,
            {"options": {"num_predict": -1, "seed": -1, "fleet": {"mode": "auto"}}},
            PromptRequest(messages=HI, mode=Mode.AUTO),
        ),
        (
            parse_ollama_generate,
            {"system": "Be short."},
            PromptRequest(messages=(ChatMessage("system", "Be short."), *HI)),
        ),
        (parse_ollama_generate, {"raw": True}, PromptRequest(prompt="Hi", raw=True)),
        (
            parse_chat_completion,
            {"response_format": {"type": "json_schema", "json_schema": {
                "name": "n", "strict": True, "schema": SCHEMA}}},
            PromptRequest(messages=HI, response_format=ResponseFormat(
                type="json_schema",
                json_schema=JsonSchemaFormat(schema=SCHEMA, name="n", strict=True),
            )),
        ),
        (
            parse_response,
            {"text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}}},
            PromptRequest(messages=HI, response_format=JSON_SCHEMA),
        ),
        (
            parse_response,
            {"text": {"verbosity": "low"}},
            PromptRequest(messages=HI),
        ),
        (
            parse_ollama_chat,
            {"format": SCHEMA},
            PromptRequest(messages=HI, response_format=JSON_SCHEMA),
        ),
        (
            parse_ollama_chat,
            {"format": "json"},
            PromptRequest(messages=HI, response_format=ResponseFormat(type="json_object")),
        ),
    ],
)  # fmt: skip
def test_a_body_becomes_a_prompt(
    parse_call: ParseCall, body: dict[str, Any], prompt: PromptRequest
) -> None:
    assert parse(parse_call, least(parse_call) | body).prompt == prompt


@pytest.mark.parametrize(
    ("parse_call", "body", "field"),
    [
        (parse_chat_completion, {"tools": [{"type": "function"}]}, "tools"),
        (parse_chat_completion, {"n": 2, "stream": True}, "n"),
        (parse_chat_completion, {"n": 5}, "n"),
        (parse_chat_completion, {"presence_penalty": 3}, "presence_penalty"),
        (parse_chat_completion, {"logit_bias": {"x": 1}}, "logit_bias"),
        (parse_chat_completion, {"response_format": {"type": "xml"}}, "response_format.type"),
        (parse_response, {"text": {"format": {"type": "xml"}}}, "text.format.type"),
        (parse_ollama_chat, {"format": "xml"}, "format"),
        (parse_chat_completion, {"modalities": ["text", "audio"]}, "modalities"),
        (parse_chat_completion, {"temprature": 1}, "temprature"),
        (parse_chat_completion, {"temperature": 9}, "temperature"),
        (parse_chat_completion, {"temperature": "1"}, "temperature"),
        (parse_chat_completion, {"max_tokens": 0}, "max_tokens"),
        (parse_chat_completion, {"messages": "Hi"}, "messages"),
        (parse_chat_completion, {"fleet": {"mode": "x"}}, "fleet.mode"),
        (parse_chat_completion, {"fleet": {"x": 1}}, "fleet.x"),
        (parse_chat_completion, {"stream_options": {"include_usage": 1}}, USAGE),
        (parse_chat_completion, {"messages": [{"content": "Hi"}]}, "messages[0].role"),
        (parse_chat_completion, {"messages": [USER | {"role": "boss"}]}, "messages[0].role"),
        (parse_chat_completion, parts({"type": "image_url"}), f"{PART}.image_url"),
        (parse_chat_completion, parts({"type": "text"}), f"{PART}.text"),
        (parse_chat_completion, {"messages": [USER | {"content": {}}]}, "messages[0].content"),
        (parse_chat_completion, {"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        (parse_chat_completion, {"stop": 1}, "stop"),
        (parse_text_completion, {"prompt": ["a", "b"]}, "prompt"),
        (parse_text_completion, {"prompt": [1, 2]}, "prompt"),
        (parse_text_completion, {"echo": True}, "echo"),
        (parse_response, {"previous_response_id": "resp_1"}, "previous_response_id"),
        (parse_response, {"input": [{"type": "function_call"}]}, "input[0].function_call"),
        (parse_response, {"input": ["Hi"]}, "input[0]"),
        (parse_response, {"input": [{"type": "reasoning"}]}, "input[0].reasoning"),
        (parse_ollama_chat, {"messages": [USER | {"images": ["AAAA"]}]}, "messages[0].images"),
        (parse_ollama_chat, {"tools": [{}]}, "tools"),
        (parse_ollama_chat, {"think": True}, "think"),
        (parse_ollama_chat, {"options": {"mirostat": 2}}, "mirostat"),
        (parse_ollama_chat, {"options": {"num_predict": -3}}, "options.num_predict"),
        (parse_ollama_chat, {"options": {"hurry": 1}}, "options.hurry"),
        (parse_ollama_generate, {"images": ["AAAA"]}, "images"),
        (parse_ollama_generate, {"suffix": "!"}, "suffix"),
        (parse_chat_completion, parts({"type": ["x"], "text": "a"}), f"{PART}.type"),
        (parse_chat_completion, parts({"type": {"a": 1}, "text": "a"}), f"{PART}.type"),
        (parse_ollama_chat, {"options": {"stop": [""]}}, "options.stop[0]"),
    ],
)  # fmt: skip
def test_a_field_that_cannot_be_honoured_is_named(
    parse_call: ParseCall, body: dict[str, Any], field: str
) -> None:
    with pytest.raises(RequestFieldError) as caught:
        parse(parse_call, least(parse_call) | body)
    assert caught.value.field == field
    assert field.rpartition(".")[2] in str(caught.value)


@pytest.mark.parametrize("parse_call", ALL)
@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'"Hi"', b"\xff\xfe{\x00", b"[" * 100_000])
def test_a_body_that_is_no_object_is_refused(parse_call: ParseCall, data: bytes) -> None:
    with pytest.raises(DecodeError, match="expected a JSON object"):
        parse_call(data)


@pytest.mark.parametrize("parse_call", ALL)
def test_a_body_without_a_model_is_refused(parse_call: ParseCall) -> None:
    body = least(parse_call)
    del body["model"]
    with pytest.raises(RequestFieldError, match="expected the field 'model'"):
        parse(parse_call, body)


def test_a_prompt_without_text_is_refused() -> None:
    with pytest.raises(PromptError, match="the prompt is empty"):
        parse(parse_chat_completion, {"model": "m", "messages": [USER | {"content": " "}]})


@pytest.mark.parametrize("parse_call", [parse_ollama_chat, parse_ollama_generate])
def test_ollama_streams_unless_it_is_told_not_to(parse_call: ParseCall) -> None:
    body = least(parse_call)
    assert parse(parse_call, body).is_streamed
    assert not parse(parse_call, body | {"stream": False}).is_streamed
    assert parse(parse_call, {"model": "m"}).prompt is None


def test_openai_streams_only_on_request() -> None:
    body = least(parse_chat_completion)
    assert not parse(parse_chat_completion, body).is_streamed
    assert parse(parse_chat_completion, body | {"stream": True}).is_streamed


def test_an_empty_schema_of_ollama_is_any_json() -> None:
    body = least(parse_ollama_chat)
    any_json = ResponseFormat(type="json_schema", json_schema=JsonSchemaFormat(schema={}))
    for form, response_format in (({}, any_json), ("", None)):
        prompt = parse(parse_ollama_chat, body | {"format": form}).prompt
        assert prompt
        assert prompt.response_format == response_format


def test_arguments_of_a_call_that_are_nested_too_deep_stay_a_text() -> None:
    arguments = "[" * 5_000 + "]" * 5_000
    calls = [{"function": {"name": "f", "arguments": arguments}}]
    messages = [USER, {"role": "assistant", "tool_calls": calls}]
    prompt = parse(parse_chat_completion, {"model": "m", "messages": messages}).prompt
    assert prompt
    assert prompt.chat[1].tool_calls == tuple(calls)
