"""Replies as the bytes of each API."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import msgspec
import pytest

from fleet.errors import DeadlineError
from fleet.http_api.answer_writer import AnswerWriter
from fleet.http_api.chat_completions import ChatCompletionWriter
from fleet.http_api.ollama_answers import OllamaChatWriter, OllamaGenerateWriter
from fleet.http_api.problems import Problem
from fleet.http_api.responses import ResponseBody, ResponseWriter
from fleet.http_api.text_completions import TextCompletionWriter
from fleet.protocol.prompt import Reply, Usage

USAGE: Final = Usage(
    prompt_tokens=10,
    tokens=3,
    sources={"exit:8": 2, "cloud": 1},
    bytes_up=0,
    bytes_down=0,
    offload_rate=1 / 3,
    ttft_ms=50.0,
    tpot_ms=20.0,
)
REPLIES: Final = (
    Reply(seq=0, text="Hel", token_id=1, source="exit:8", generation="g1"),
    Reply(seq=1, token_id=2, source="cloud"),
    Reply(seq=2, text="lö", token_id=3, source="exit:8"),
    Reply(seq=3, text="!", done=True, finish_reason="stop", usage=USAGE, bundle_id="b1"),
)
WRITERS: Final[dict[str, Callable[[str], AnswerWriter]]] = {
    "chat": ChatCompletionWriter,
    "text": TextCompletionWriter,
    "response": partial(ResponseWriter, body=ResponseBody(model="m", input="Hi")),
    "ollama chat": OllamaChatWriter,
    "ollama generate": OllamaGenerateWriter,
}


def stream(writer: AnswerWriter, replies: tuple[Reply, ...] = REPLIES) -> list[dict[str, Any]]:
    """The objects of a stream."""
    data = writer.begin(replies[0]) + b"".join(writer.add(reply) for reply in replies)
    lines = [line.rpartition("data: ")[2] for line in data.decode().splitlines()]
    return [json.loads(line) for line in lines if line.startswith("{")]


def text_of(value: dict[str, Any]) -> str:
    """The text of an event, a line or a whole answer, where its API has it."""
    match value:
        case {"choices": [{"delta": {"content": str(text)}}]}:
            return text
        case {"choices": [{"message": {"content": str(text)}}]}:
            return text
        case {"choices": [{"text": str(text)}]}:
            return text
        case {"type": "response.output_text.delta", "delta": str(text)}:
            return text
        case {"output": [{"content": [{"text": str(text)}]}]}:
            return text
        case {"message": {"content": str(text)}} | {"response": str(text)}:
            return text
    return ""


@pytest.mark.parametrize("name", WRITERS)
def test_the_pieces_of_a_stream_and_the_whole_answer_have_the_same_text(name: str) -> None:
    writer: AnswerWriter = WRITERS[name]("m")
    assert "".join(map(text_of, stream(writer))) == "Hellö!"
    whole = msgspec.to_builtins(writer.whole(REPLIES[-1]))
    assert text_of(whole) == "Hellö!"
    assert whole["fleet"]["counts"]["sources"] == USAGE.sources
    assert whole["fleet"]["generation"] == "g1"


@pytest.mark.parametrize("name", WRITERS)
def test_each_token_has_its_source(name: str) -> None:
    objects = stream(WRITERS[name]("m"))
    sources = [each["fleet"]["source"] for each in objects if "source" in each.get("fleet", {})]
    assert sources == ["exit:8", "cloud", "exit:8"]


@pytest.mark.parametrize("name", WRITERS)
def test_a_device_of_an_older_version_sends_no_counts(name: str) -> None:
    last = msgspec.structs.replace(REPLIES[-1], usage=None, bundle_id=None)
    writer: AnswerWriter = WRITERS[name]("m")
    stream(writer, (*REPLIES[:-1], last))
    whole = msgspec.to_builtins(writer.whole(last))
    assert text_of(whole) == "Hellö!"


@pytest.mark.parametrize("name", WRITERS)
def test_a_stream_that_fails_ends_with_its_error(name: str) -> None:
    writer: AnswerWriter = WRITERS[name]("m")
    data = writer.fail(Problem.of(DeadlineError("too late")))
    error = json.loads(data.decode().rpartition("data: ")[2])["error"]
    assert (error if isinstance(error, str) else error["message"]) == "too late"


def test_a_chat_completion_in_bytes() -> None:
    writer = ChatCompletionWriter("m")
    writer.created_at = 5.0
    head = '"id":"chatcmpl-g1","object":"chat.completion.chunk","created":5,"model":"m"'
    choice = '"finish_reason":null,"index":0,"logprobs":null'
    assert writer.begin(REPLIES[0]).decode() == (
        f'data: {{{head},"choices":[{{"delta":{{"role":"assistant","content":""}},{choice}}}]}}\n\n'
    )
    assert writer.add(REPLIES[0]).decode() == (
        f'data: {{{head},"choices":[{{"delta":{{"content":"Hel"}},{choice}}}],'
        '"fleet":{"source":"exit:8"}}\n\n'
    )
    assert writer.add(REPLIES[-1]).endswith(b"\n\ndata: [DONE]\n\n")


def test_the_times_of_an_answer_have_the_names_of_llama_cpp() -> None:
    writer = ChatCompletionWriter("m")
    stream(writer)
    assert msgspec.to_builtins(writer.whole(REPLIES[-1]).timings) == {
        "prompt_n": 10,
        "prompt_ms": 50.0,
        "prompt_per_token_ms": 5.0,
        "prompt_per_second": 200.0,
        "predicted_n": 3,
        "predicted_ms": 40.0,
        "predicted_per_token_ms": 20.0,
        "predicted_per_second": 50.0,
    }


def test_the_times_of_a_line_are_in_nanoseconds() -> None:
    writer = OllamaChatWriter("m")
    *_, last = stream(writer)
    durations = ("prompt_eval_duration", "eval_duration", "total_duration")
    assert [last[name] for name in durations] == [50_000_000, 40_000_000, 90_000_000]
    assert (last["prompt_eval_count"], last["eval_count"]) == (10, 3)
