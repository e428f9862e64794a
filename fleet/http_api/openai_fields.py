"""Fields that several requests and responses of OpenAI's API share."""

from __future__ import annotations

from typing import Any, Final

from msgspec import Struct

from fleet.http_api.answer_writer import EVENT_STREAM, AnswerWriter, event
from fleet.http_api.problems import Problem, openai_error
from fleet.http_api.request_fields import prompt_fields, unsupported
from fleet.protocol.constraint import ResponseFormat
from fleet.protocol.prompt import AnswerOptions, LogitBiases, Reply
from fleet.protocol.types import (
    NumChoices,
    Penalty,
    RepetitionPenalty,
    Seed,
    Share,
    StopText,
    StopTexts,
    Temperature,
    TopK,
    TopP,
)

ADVICE: Final = "leave it out"
DONE: Final = b"data: [DONE]\n\n"


class StreamOptions(Struct, kw_only=True):
    """Options of a stream; `include_usage` adds an event with the counts of tokens."""

    include_usage: bool | None = None


class OpenAiSampling(Struct, forbid_unknown_fields=True, kw_only=True):
    """The fields that requests for a completion share. `fleet` has any option of a prompt.

    `metadata`, `prompt_cache_key`, `prompt_cache_retention`, `safety_identifier`, `service_tier`,
    `store` and `user` do not concern the answer.
    """

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    seed: Seed | None = None
    stop: StopText | StopTexts | None = None
    n: NumChoices | None = None
    response_format: ResponseFormat | None = None
    min_p: Share | None = None
    repetition_penalty: RepetitionPenalty | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: LogitBiases | None = None
    fleet: AnswerOptions | None = None
    metadata: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    safety_identifier: Any = None
    service_tier: Any = None
    store: Any = None
    user: Any = None

    @property
    def includes_usage(self) -> bool:
        """Whether the stream ends with an event that has the counts of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)


def openai_prompt_fields(body: OpenAiSampling) -> dict[str, Any]:
    """Return the fields of a prompt that a body has under the same names, and those of `fleet`.

    Raises:
        RequestFieldError: several answers cannot be a stream.
    """
    fields = prompt_fields(body, body.fleet)
    if fields.get("n", 1) > 1:
        if body.stream:
            raise unsupported("n", (1,), "leave out 'stream' for several answers")
        fields["stream"] = False
    return fields


class PromptTokensDetails(Struct, frozen=True):
    """The tokens of a prompt that did not run again, because an earlier answer had run them."""

    cached_tokens: int


class TokenUsage(Struct, frozen=True, kw_only=True):
    """Counts of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


def token_usage(last_reply: Reply) -> TokenUsage:
    """Return the counts of tokens of an answer."""
    counts = last_reply.usage
    num_prompt = counts.prompt_tokens if counts else 0
    num_new = counts.tokens if counts else 0
    return TokenUsage(
        prompt_tokens=num_prompt,
        completion_tokens=num_new,
        total_tokens=num_prompt + num_new,
        prompt_tokens_details=PromptTokensDetails(counts.reused_tokens if counts else 0),
    )


class CompletionWriter(AnswerWriter):
    """The part that the writers of both kinds of completions share: the options, and an error."""

    content_type = EVENT_STREAM

    def __init__(self, model: str, *, includes_usage: bool = False) -> None:
        super().__init__(model)
        self._includes_usage = includes_usage

    def fail(self, problem: Problem) -> bytes:
        return event(openai_error(problem))
