"""OpenAI's chat completions: `POST /v1/chat/completions`."""

from __future__ import annotations

from functools import partial
from typing import Any, Final, Literal

from msgspec import Struct

from fleet.http_api.answer_facts import FleetFacts, Timings, answer_facts, timings, token_facts
from fleet.http_api.answer_writer import AnswerCall, event
from fleet.http_api.conversation import chat_messages
from fleet.http_api.logprobs import ChatLogprobs, chat_logprobs
from fleet.http_api.openai_fields import (
    ADVICE,
    DONE,
    CompletionWriter,
    OpenAiSampling,
    TokenUsage,
    openai_prompt_fields,
    token_usage,
)
from fleet.http_api.request_fields import check_neutral, convert_fields, decode_object
from fleet.protocol.prompt import Choice, JsonObject, Reply, prompt_of_fields
from fleet.protocol.types import MaxNewTokens, TopLogprobs

NEUTRAL: Final[dict[str, tuple[Any, ...]]] = {
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "web_search_options": (),
}
"""Fields without a meaning here, with the values that change nothing."""


class ChatCompletionBody(OpenAiSampling, forbid_unknown_fields=True, kw_only=True):
    """The body of a request. `max_completion_tokens` counts before `max_tokens`."""

    messages: list[JsonObject]
    max_tokens: MaxNewTokens | None = None
    max_completion_tokens: MaxNewTokens | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    audio: Any = None
    function_call: Any = None
    functions: Any = None
    modalities: Any = None
    parallel_tool_calls: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    tool_choice: Any = None
    tools: Any = None
    verbosity: Any = None
    web_search_options: Any = None


class AssistantMessage(Struct, frozen=True, kw_only=True):
    """The message of a whole answer."""

    content: str
    role: Literal["assistant"] = "assistant"
    refusal: None = None


class AssistantDelta(Struct, frozen=True, omit_defaults=True, kw_only=True):
    """The next piece of an answer's message; the first one has the role."""

    role: str | None = None
    content: str | None = None


class ChatChoice(Struct, frozen=True, kw_only=True):
    """A whole answer."""

    message: AssistantMessage
    finish_reason: str
    index: int
    logprobs: ChatLogprobs | None


class ChatChunkChoice(Struct, frozen=True, kw_only=True):
    """A piece of an answer."""

    delta: AssistantDelta
    finish_reason: str | None = None
    index: int = 0
    logprobs: ChatLogprobs | None = None


class ChatCompletion(Struct, frozen=True, kw_only=True):
    """The response without `stream`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: tuple[ChatChoice, ...]
    usage: TokenUsage
    fleet: FleetFacts
    timings: Timings | None


class ChatCompletionChunk(Struct, frozen=True, omit_defaults=True, kw_only=True):
    """An event of the response with `stream`."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: tuple[ChatChunkChoice, ...]
    usage: TokenUsage | None = None
    fleet: FleetFacts | None = None
    timings: Timings | None = None


class ChatCompletionWriter(CompletionWriter):
    """The bytes of one chat completion."""

    def begin(self, reply: Reply) -> bytes:
        super().begin(reply)
        return self._event(ChatChunkChoice(delta=AssistantDelta(role="assistant", content="")))

    def whole(self, reply: Reply) -> ChatCompletion:
        return ChatCompletion(
            id=self._id,
            object="chat.completion",
            created=int(self.created_at),
            model=self.model,
            choices=tuple(map(_chat_choice, self._choices(reply))),
            usage=token_usage(reply),
            fleet=answer_facts(reply, self.generation),
            timings=timings(reply.usage),
        )

    def _chunk(self, reply: Reply) -> bytes:
        choice = ChatChunkChoice(
            delta=AssistantDelta(content=reply.text), logprobs=chat_logprobs(reply.logprobs)
        )
        return self._event(choice, fleet=token_facts(reply))

    def _last(self, reply: Reply) -> bytes:
        rest = self._chunk(reply) if reply.text else b""
        choice = ChatChunkChoice(delta=AssistantDelta(), finish_reason=reply.finish_reason)
        facts = answer_facts(reply, self.generation)
        times = timings(reply.usage)
        if not self._includes_usage:
            return rest + self._event(choice, fleet=facts, timings=times) + DONE
        usage = self._event(usage=token_usage(reply), timings=times)
        return rest + self._event(choice, fleet=facts) + usage + DONE

    def _event(
        self,
        *choices: ChatChunkChoice,
        usage: TokenUsage | None = None,
        fleet: FleetFacts | None = None,
        timings: Timings | None = None,
    ) -> bytes:
        return event(
            ChatCompletionChunk(
                id=self._id,
                object="chat.completion.chunk",
                created=int(self.created_at),
                model=self.model,
                choices=choices,
                usage=usage,
                fleet=fleet,
                timings=timings,
            )
        )

    @property
    def _id(self) -> str:
        return f"chatcmpl-{self.id}"


def _chat_choice(choice: Choice) -> ChatChoice:
    return ChatChoice(
        message=AssistantMessage(content=choice.full_text or ""),
        finish_reason=choice.finish_reason,
        index=choice.index,
        logprobs=chat_logprobs(choice.logprobs),
    )


def parse_chat_completion(data: bytes) -> AnswerCall:
    """Parse a request.

    Raises:
        DecodeError, PromptError: it cannot be honoured.
    """
    body = convert_fields(decode_object(data), ChatCompletionBody)
    check_neutral(body, NEUTRAL, ADVICE)
    fields = openai_prompt_fields(body) | {"messages": chat_messages(body.messages)}
    max_tokens = body.max_completion_tokens or body.max_tokens
    if max_tokens:
        fields["max_new_tokens"] = max_tokens
    return AnswerCall(
        model=body.model,
        prompt=prompt_of_fields(fields),
        is_streamed=bool(body.stream),
        make_writer=partial(ChatCompletionWriter, includes_usage=body.includes_usage),
    )
