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
from fleet.http_api.openai_fields import CompletionWriter
from fleet.http_api.problems import Problem
from fleet.http_api.responses import ResponseBody, ResponseWriter
from fleet.http_api.text_completions import TextCompletionWriter
from fleet.protocol.prompt import Choice, Reply, TokenLogprob, TopLogprob, Usage

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


LIKELY: Final = TokenLogprob("Hel", 1, -0.5, (TopLogprob("Hel", 1, -0.5), TopLogprob("ä", 2, -1.5)))
LOGGED: Final = (
    msgspec.structs.replace(REPLIES[0], logprobs=(LIKELY,)),
    msgspec.structs.replace(REPLIES[2], logprobs=(TokenLogprob("lö!", 3, -0.1),)),
    msgspec.structs.replace(REPLIES[3], text=""),
)
API_LOGPROBS: Final = [
    {
        "token": "Hel",
        "logprob": -0.5,
        "bytes": [72, 101, 108],
        "top_logprobs": [
            {"token": "Hel", "logprob": -0.5, "bytes": [72, 101, 108]},
            {"token": "ä", "logprob": -1.5, "bytes": [195, 164]},
        ],
    },
    {"token": "lö!", "logprob": -0.1, "bytes": [108, 195, 182, 33], "top_logprobs": []},
]


def whole(name: str) -> dict[str, Any]:
    """The whole answer with log-probabilities, decoded from JSON."""
    writer = WRITERS[name]("m")
    stream(writer, LOGGED)
    value: dict[str, Any] = json.loads(msgspec.json.encode(writer.whole(LOGGED[-1])))
    return value


def test_log_probabilities_have_the_shape_of_each_api() -> None:
    assert whole("chat")["choices"][0]["logprobs"]["content"] == API_LOGPROBS
    assert whole("response")["output"][0]["content"][0]["logprobs"] == API_LOGPROBS
    assert whole("ollama chat")["logprobs"] == API_LOGPROBS
    assert whole("text")["choices"][0]["logprobs"] == {
        "tokens": ["Hel", "lö!"],
        "token_logprobs": [-0.5, -0.1],
        "top_logprobs": [{"Hel": -0.5, "ä": -1.5}, {}],
        "text_offset": [0, 3],
    }


def test_a_stream_has_the_log_probability_of_each_token() -> None:
    chunks = stream(ChatCompletionWriter("m"), LOGGED)
    logged = [chunk["choices"][0]["logprobs"] for chunk in chunks if chunk["choices"]]
    assert [each["content"] for each in logged if each] == [[each] for each in API_LOGPROBS]
    text = stream(TextCompletionWriter("m"), LOGGED)
    offsets = [each["choices"][0]["logprobs"]["text_offset"] for each in text[:2]]
    assert offsets == [[0], [3]]


def test_several_answers_are_several_choices() -> None:
    choices = (
        Choice(index=0, full_text="a", finish_reason="stop", logprobs=(LIKELY,)),
        Choice(index=1, full_text="b", finish_reason="length"),
    )
    only = msgspec.structs.replace(REPLIES[-1], seq=0, text="", choices=choices, generation="g1")
    for writer in (ChatCompletionWriter("m"), TextCompletionWriter("m")):
        writer.begin(only)
        writer.add(only)
        value = msgspec.to_builtins(writer.whole(only))
        answers = [(each["index"], each["finish_reason"]) for each in value["choices"]]
        assert answers == [(0, "stop"), (1, "length")]
        assert [text_of({"choices": [each]}) for each in value["choices"]] == ["a", "b"]
        assert value["choices"][1]["logprobs"] is None


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


@pytest.mark.parametrize("writer_type", [ChatCompletionWriter, TextCompletionWriter])
@pytest.mark.parametrize("includes_usage", [False, True])
def test_the_times_are_in_the_event_of_the_usage_if_there_is_one(
    writer_type: type[CompletionWriter], includes_usage: bool
) -> None:
    """Open WebUI adds up the counts of all events that have a usage or times."""
    *events, last = stream(writer_type("m", includes_usage=includes_usage))
    assert [event for event in events if "timings" in event or "usage" in event] == []
    assert "timings" in last
    assert ("usage" in last) is includes_usage
    assert (events[-1] if includes_usage else last)["fleet"]["counts"]["tokens"] == 3


def test_the_times_of_a_line_are_in_nanoseconds() -> None:
    writer = OllamaChatWriter("m")
    *_, last = stream(writer)
    durations = ("prompt_eval_duration", "eval_duration", "total_duration")
    assert [last[name] for name in durations] == [50_000_000, 40_000_000, 90_000_000]
    assert (last["prompt_eval_count"], last["eval_count"]) == (10, 3)
