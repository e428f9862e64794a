"""OpenAI's responses: `POST /v1/responses`, without any state between requests."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Final, Literal

import msgspec
from msgspec import Struct

from fleet.errors import RequestFieldError
from fleet.http_api.answer_facts import FleetFacts, Timings, answer_facts, timings, token_facts
from fleet.http_api.answer_writer import EVENT_STREAM, AnswerCall, AnswerWriter
from fleet.http_api.conversation import ONLY_TEXT, chat_messages
from fleet.http_api.logprobs import ApiLogprob, api_logprobs
from fleet.http_api.openai_fields import ADVICE
from fleet.http_api.problems import Problem, openai_error
from fleet.http_api.request_fields import (
    check_neutral,
    convert_fields,
    decode_object,
    prompt_fields,
    unsupported,
)
from fleet.protocol.prompt import AnswerOptions, JsonObject, Reply, prompt_of_fields
from fleet.protocol.types import MaxNewTokens, Temperature, TopLogprobs, TopP

LOGPROBS: Final = "message.output_text.logprobs"
NEUTRAL: Final[dict[str, tuple[Any, ...]]] = {
    "background": (False,),
    "conversation": (),
    "previous_response_id": (),
    "prompt": (),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "truncation": ("disabled",),
}
"""Fields without a meaning here, with the values that change nothing."""


class TextFormat(Struct, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """The form of an answer. `name`, `description` and `strict` change nothing."""

    type: Literal["text", "json_object", "json_schema"]
    schema: JsonObject | None = None
    name: str | None = None
    description: str | None = None
    strict: bool | None = None

    def as_response_format(self) -> JsonObject:
        """Return it as a prompt has it."""
        if self.schema is None:
            return {"type": self.type}
        return {"type": self.type, "json_schema": {"schema": self.schema}}


class ResponseText(Struct, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """The form of an answer; `verbosity` does not concern it."""

    format: TextFormat | None = None
    verbosity: str | None = None


PLAIN_TEXT: Final = ResponseText(format=TextFormat(type="text"))


class ResponseBody(Struct, forbid_unknown_fields=True, kw_only=True):
    """The body of a request. `input` is a text, or a list of messages with texts. Of `include`,
    only `LOGPROBS` has a meaning: other parts of a response do not occur here.

    No response is stored: `store` is ignored. `max_tool_calls`, `metadata`, `parallel_tool_calls`,
    `prompt_cache_key`, `prompt_cache_retention`, `reasoning`, `safety_identifier`, `service_tier`,
    `stream_options` and `user` do not concern the answer.
    """

    model: str
    input: str | list[Any]
    instructions: str | None = None
    max_output_tokens: MaxNewTokens | None = None
    stream: bool | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    include: list[str] = []
    top_logprobs: TopLogprobs | None = None
    text: ResponseText | None = None
    fleet: AnswerOptions | None = None
    background: Any = None
    conversation: Any = None
    max_tool_calls: Any = None
    metadata: Any = None
    parallel_tool_calls: Any = None
    previous_response_id: Any = None
    prompt: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    reasoning: Any = None
    safety_identifier: Any = None
    service_tier: Any = None
    store: Any = None
    stream_options: Any = None
    tool_choice: Any = None
    tools: Any = None
    truncation: Any = None
    user: Any = None


class OutputText(Struct, frozen=True, kw_only=True):
    """A text of the answer."""

    text: str
    type: Literal["output_text"] = "output_text"
    annotations: tuple[()] = ()
    logprobs: tuple[ApiLogprob, ...] = ()


class OutputMessage(Struct, frozen=True, kw_only=True):
    """The message that is the answer."""

    id: str
    status: str
    content: tuple[OutputText, ...]
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"


class ResponseUsage(Struct, frozen=True, kw_only=True):
    """Counts of tokens."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens_details: dict[str, int]


class IncompleteDetails(Struct, frozen=True):
    """The reason why an answer ended early."""

    reason: str


class ResponseObject(Struct, frozen=True, kw_only=True):
    """The response, also inside the first and the last events of a stream."""

    id: str
    created_at: int
    model: str
    status: str
    output: tuple[OutputMessage, ...]
    instructions: str | None
    max_output_tokens: int | None
    temperature: float | None
    top_p: float | None
    usage: ResponseUsage | None = None
    incomplete_details: IncompleteDetails | None = None
    fleet: FleetFacts | None = None
    timings: Timings | None = None
    object: Literal["response"] = "response"
    error: None = None
    metadata: dict[str, str] = {}
    parallel_tool_calls: bool = False
    previous_response_id: None = None
    store: bool = False
    text: ResponseText
    tool_choice: Literal["auto"] = "auto"
    tools: tuple[()] = ()
    truncation: Literal["disabled"] = "disabled"


class ResponseWriter(AnswerWriter):
    """The bytes of one response; a stream has numbered events, each with its type."""

    content_type = EVENT_STREAM

    def __init__(self, model: str, body: ResponseBody) -> None:
        super().__init__(model)
        self._body = body
        self._num_events = 0

    def begin(self, reply: Reply) -> bytes:
        super().begin(reply)
        response = self._response("in_progress")
        message = OutputMessage(id=self._message_id, status="in_progress", content=())
        return b"".join(
            [
                self._event("response.created", response=response),
                self._event("response.in_progress", response=response),
                self._event("response.output_item.added", output_index=0, item=message),
                self._content_event("response.content_part.added", part=OutputText(text="")),
            ]
        )

    def whole(self, reply: Reply) -> ResponseObject:
        is_cut = reply.finish_reason == "length"
        sampling = reply.usage.sampling if reply.usage else None
        response = self._response(_status(reply), self._message(_status(reply)))
        return msgspec.structs.replace(
            response,
            temperature=sampling.temperature if sampling else response.temperature,
            top_p=sampling.top_p if sampling else response.top_p,
            usage=_usage(reply),
            incomplete_details=IncompleteDetails("max_output_tokens") if is_cut else None,
            fleet=answer_facts(reply, self.generation),
            timings=timings(reply.usage),
        )

    def fail(self, problem: Problem) -> bytes:
        error = openai_error(problem).error
        return self._event(
            "error", code=error.code, message=error.message, param=error.param, error=error
        )

    def _chunk(self, reply: Reply) -> bytes:
        facts = token_facts(reply)
        origin = {"fleet": facts} if facts else {}
        return self._content_event(
            "response.output_text.delta",
            delta=reply.text,
            logprobs=api_logprobs(reply.logprobs),
            **origin,
        )

    def _last(self, reply: Reply) -> bytes:
        text = self._text()
        message = self._message(_status(reply))
        name = f"response.{_status(reply)}"
        return b"".join(
            [
                self._chunk(reply) if reply.text else b"",
                self._content_event(
                    "response.output_text.done", text=self.text, logprobs=text.logprobs
                ),
                self._content_event("response.content_part.done", part=text),
                self._event("response.output_item.done", output_index=0, item=message),
                self._event(name, response=self.whole(reply)),
            ]
        )

    @property
    def _message_id(self) -> str:
        return f"msg_{self.id}"

    def _message(self, status: str) -> OutputMessage:
        return OutputMessage(id=self._message_id, status=status, content=(self._text(),))

    def _text(self) -> OutputText:
        return OutputText(text=self.text, logprobs=api_logprobs(self._logprobs))

    def _response(self, status: str, *output: OutputMessage) -> ResponseObject:
        body = self._body
        return ResponseObject(
            id=f"resp_{self.id}",
            created_at=int(self.created_at),
            model=self.model,
            status=status,
            output=output,
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            temperature=body.temperature,
            top_p=body.top_p,
            text=body.text or PLAIN_TEXT,
        )

    def _content_event(self, name: str, **fields: Any) -> bytes:
        return self._event(
            name, item_id=self._message_id, output_index=0, content_index=0, **fields
        )

    def _event(self, name: str, **fields: Any) -> bytes:
        event = {"type": name, "sequence_number": self._num_events, **fields}
        self._num_events += 1
        return b"event: %b\ndata: %b\n\n" % (name.encode(), msgspec.json.encode(event))


def _status(reply: Reply) -> str:
    return "incomplete" if reply.finish_reason == "length" else "completed"


def _usage(reply: Reply) -> ResponseUsage | None:
    counts = reply.usage
    if counts is None:
        return None
    return ResponseUsage(
        input_tokens=counts.prompt_tokens,
        output_tokens=counts.tokens,
        total_tokens=counts.prompt_tokens + counts.tokens,
        input_tokens_details={"cached_tokens": counts.reused_tokens},
        output_tokens_details={"reasoning_tokens": 0},
    )


def parse_response(data: bytes) -> AnswerCall:
    """Parse a request.

    Raises:
        DecodeError, PromptError: it cannot be honoured.
    """
    body = convert_fields(decode_object(data), ResponseBody)
    check_neutral(body, NEUTRAL, ADVICE)
    fields = prompt_fields(body, body.fleet) | {"messages": _messages(body)}
    if body.top_logprobs or LOGPROBS in body.include:
        fields["logprobs"] = True
    if body.text and body.text.format:
        fields["response_format"] = body.text.format.as_response_format()
    if body.max_output_tokens:
        fields["max_new_tokens"] = body.max_output_tokens
    return AnswerCall(
        model=body.model,
        prompt=prompt_of_fields(fields),
        is_streamed=bool(body.stream),
        make_writer=partial(ResponseWriter, body=body),
    )


def _messages(body: ResponseBody) -> list[JsonObject]:
    is_text = isinstance(body.input, str)
    items = [{"role": "user", "content": body.input}] if is_text else _items(body.input)
    system = [{"role": "system", "content": body.instructions}] if body.instructions else []
    return [*system, *chat_messages(items, "input")]


def _items(items: Sequence[Any]) -> list[JsonObject]:
    for i, item in enumerate(items):
        if not isinstance(item, dict):
            raise RequestFieldError(f"input[{i}]", f"input[{i}]: expected an object with a message")
        kind = item.get("type", "message")
        if kind != "message":
            raise unsupported(f"input[{i}].{kind}"[:200], (), ONLY_TEXT)
    return list(items)
