"""OpenAI's text completions: `POST /v1/completions`, which continue a text without a template."""

from __future__ import annotations

from functools import partial
from typing import Any, Final, Literal

import msgspec
from msgspec import Struct

from fleet.errors import RequestFieldError
from fleet.http_api.answer_facts import FleetFacts, Timings, answer_facts, timings, token_facts
from fleet.http_api.answer_writer import AnswerCall, event
from fleet.http_api.logprobs import TextLogprobs, text_logprobs
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
from fleet.protocol.prompt import Choice, Reply, prompt_of_fields
from fleet.protocol.types import MaxNewTokens, TopLogprobs

NEUTRAL: Final[dict[str, tuple[Any, ...]]] = {
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
}
"""Fields without a meaning here, with the values that change nothing."""


class TextCompletionBody(OpenAiSampling, forbid_unknown_fields=True, kw_only=True):
    """The body of a request. `prompt` is a text, or a list with one text."""

    prompt: str | list[Any]
    max_tokens: MaxNewTokens | None = None
    logprobs: TopLogprobs | None = None
    best_of: Any = None
    echo: Any = None
    suffix: Any = None


class TextChoice(Struct, frozen=True, kw_only=True):
    """A whole answer, or a piece of it."""

    text: str
    finish_reason: str | None = None
    index: int = 0
    logprobs: TextLogprobs | None = None


class TextCompletion(Struct, frozen=True, omit_defaults=True, kw_only=True):
    """The response, or with `stream` an event of it."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: tuple[TextChoice, ...]
    usage: TokenUsage | None = None
    fleet: FleetFacts | None = None
    timings: Timings | None = None


class TextCompletionWriter(CompletionWriter):
    """The bytes of one text completion."""

    def whole(self, reply: Reply) -> TextCompletion:
        choices = map(_text_choice, self._choices(reply))
        return self._end(reply, *choices, usage=token_usage(reply))

    def _chunk(self, reply: Reply) -> bytes:
        return event(self._completion(self._piece(reply), fleet=token_facts(reply)))

    def _last(self, reply: Reply) -> bytes:
        end = self._end(reply, self._piece(reply))
        if not self._includes_usage:
            return event(end) + DONE
        usage = self._completion(usage=token_usage(reply), timings=end.timings)
        return event(msgspec.structs.replace(end, timings=None)) + event(usage) + DONE

    def _piece(self, reply: Reply) -> TextChoice:
        offset = self.num_characters - len(reply.text)
        return TextChoice(
            text=reply.text,
            finish_reason=reply.finish_reason,
            logprobs=text_logprobs(reply.logprobs, offset),
        )

    def _end(
        self, reply: Reply, *choices: TextChoice, usage: TokenUsage | None = None
    ) -> TextCompletion:
        return self._completion(
            *choices,
            usage=usage,
            fleet=answer_facts(reply, self.generation),
            timings=timings(reply.usage),
        )

    def _completion(
        self,
        *choices: TextChoice,
        usage: TokenUsage | None = None,
        fleet: FleetFacts | None = None,
        timings: Timings | None = None,
    ) -> TextCompletion:
        return TextCompletion(
            id=f"cmpl-{self.id}",
            object="text_completion",
            created=int(self.created_at),
            model=self.model,
            choices=choices,
            usage=usage,
            fleet=fleet,
            timings=timings,
        )


def _text_choice(choice: Choice) -> TextChoice:
    return TextChoice(
        text=choice.full_text or "",
        finish_reason=choice.finish_reason,
        index=choice.index,
        logprobs=text_logprobs(choice.logprobs),
    )


def parse_text_completion(data: bytes) -> AnswerCall:
    """Parse a request.

    Raises:
        DecodeError, PromptError: it cannot be honoured.
    """
    body = convert_fields(decode_object(data), TextCompletionBody)
    check_neutral(body, NEUTRAL, ADVICE)
    fields = openai_prompt_fields(body) | {"prompt": _text(body.prompt), "raw": True}
    if body.logprobs is not None:
        fields |= {"logprobs": True, "top_logprobs": body.logprobs}
    if body.max_tokens:
        fields["max_new_tokens"] = body.max_tokens
    return AnswerCall(
        model=body.model,
        prompt=prompt_of_fields(fields),
        is_streamed=bool(body.stream),
        make_writer=partial(TextCompletionWriter, includes_usage=body.includes_usage),
    )


def _text(prompt: str | list[Any]) -> str:
    texts = [prompt] if isinstance(prompt, str) else prompt
    if len(texts) != 1 or not isinstance(texts[0], str):
        raise RequestFieldError("prompt", "prompt: expected one text; send each text by itself")
    return texts[0]
