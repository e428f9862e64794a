"""Ollama's answers: `POST /api/chat` and `POST /api/generate`."""

from __future__ import annotations

import time
from abc import abstractmethod
from typing import Any, Final, Literal

from msgspec import Struct

from fleet.http_api.answer_facts import token_facts
from fleet.http_api.answer_writer import JSON_LINES, AnswerCall, AnswerWriter, json_line
from fleet.http_api.conversation import chat_messages
from fleet.http_api.logprobs import api_logprobs
from fleet.http_api.ollama_fields import (
    ADVICE,
    OllamaBody,
    OllamaDuration,
    ollama_end,
    ollama_prompt_fields,
    ollama_time,
)
from fleet.http_api.problems import Problem, ollama_error
from fleet.http_api.request_fields import check_neutral, convert_fields, decode_object
from fleet.protocol.prompt import JsonObject, Reply, prompt_of_fields

NEUTRAL: Final[dict[str, tuple[Any, ...]]] = {
    "context": ([],),
    "images": ([],),
    "suffix": ("",),
    "template": ("",),
}
"""Fields without a meaning here, with the values that change nothing."""


class OllamaChatBody(OllamaBody, forbid_unknown_fields=True, kw_only=True):
    """The body of a chat. Without messages the model is only loaded."""

    messages: list[JsonObject] = []


class OllamaGenerateBody(OllamaBody, forbid_unknown_fields=True, kw_only=True):
    """The body of a completion. `prompt` is a message of the user, or with `raw` a text to
    continue. Without a prompt the model is only loaded.
    """

    prompt: str = ""
    system: str = ""
    raw: bool = False
    context: Any = None
    images: Any = None
    suffix: Any = None
    template: Any = None


class OllamaMessage(Struct, frozen=True, kw_only=True):
    """A piece of an answer, or the whole answer."""

    role: Literal["assistant"] = "assistant"
    content: str = ""


class OllamaChatLine(OllamaDuration, frozen=True, omit_defaults=True, kw_only=True):
    """A line of a chat's response; the last one is `done`."""

    model: str
    created_at: str
    message: OllamaMessage
    done: bool


class OllamaGenerateLine(OllamaDuration, frozen=True, omit_defaults=True, kw_only=True):
    """A line of a completion's response; the last one is `done`."""

    model: str
    created_at: str
    response: str
    done: bool


class OllamaWriter(AnswerWriter):
    """The bytes of one answer, a line for each token."""

    content_type = JSON_LINES

    def whole(self, reply: Reply) -> Struct:
        end = ollama_end(reply, self.generation)
        logprobs = api_logprobs(self._logprobs) or None
        return self._line(self.text, done=True, logprobs=logprobs, **end)

    def fail(self, problem: Problem) -> bytes:
        return json_line(ollama_error(problem))

    def _chunk(self, reply: Reply) -> bytes:
        logprobs = api_logprobs(reply.logprobs) or None
        facts = token_facts(reply)
        return json_line(self._line(reply.text, done=False, logprobs=logprobs, fleet=facts))

    def _last(self, reply: Reply) -> bytes:
        end = ollama_end(reply, self.generation)
        return json_line(self._line(reply.text, done=True, **end))

    @abstractmethod
    def _line(self, text: str, *, done: bool, **end: Any) -> Struct:
        """Return a line with a text and the fields `end`."""

    @property
    def _now(self) -> str:
        return ollama_time(time.time())


class OllamaChatWriter(OllamaWriter):
    """The bytes of one chat."""

    def _line(self, text: str, *, done: bool, **end: Any) -> Struct:
        message = OllamaMessage(content=text)
        return OllamaChatLine(
            model=self.model, created_at=self._now, message=message, done=done, **end
        )


class OllamaGenerateWriter(OllamaWriter):
    """The bytes of one completion."""

    def _line(self, text: str, *, done: bool, **end: Any) -> Struct:
        return OllamaGenerateLine(
            model=self.model, created_at=self._now, response=text, done=done, **end
        )


def parse_ollama_chat(data: bytes) -> AnswerCall:
    """Parse a request for a chat.

    Raises:
        DecodeError, PromptError: it cannot be honoured.
    """
    body = convert_fields(decode_object(data), OllamaChatBody)
    fields = ollama_prompt_fields(body) | {"messages": chat_messages(body.messages)}
    return AnswerCall(
        model=body.model,
        prompt=prompt_of_fields(fields) if body.messages else None,
        is_streamed=body.is_streamed,
        make_writer=OllamaChatWriter,
    )


def parse_ollama_generate(data: bytes) -> AnswerCall:
    """Parse a request for a completion.

    Raises:
        DecodeError, PromptError: it cannot be honoured.
    """
    body = convert_fields(decode_object(data), OllamaGenerateBody)
    check_neutral(body, NEUTRAL, ADVICE)
    fields = ollama_prompt_fields(body)
    if body.raw:
        fields |= {"prompt": body.prompt, "raw": True}
    else:
        fields["messages"] = _generate_messages(body)
    return AnswerCall(
        model=body.model,
        prompt=prompt_of_fields(fields) if body.prompt else None,
        is_streamed=body.is_streamed,
        make_writer=OllamaGenerateWriter,
    )


def _generate_messages(body: OllamaGenerateBody) -> list[JsonObject]:
    system = [{"role": "system", "content": body.system}] if body.system else []
    return [*system, {"role": "user", "content": body.prompt}]
