"""Fields that several requests and responses of OpenAI's API share."""

from __future__ import annotations

from typing import Any, Final

from msgspec import Struct

from fleet.http_api.request_fields import check_neutral
from fleet.protocol.prompt import AnswerOptions, Reply
from fleet.protocol.types import Seed, StopText, StopTexts, Temperature, TopK, TopP

ADVICE: Final = "leave it out"
DONE: Final = b"data: [DONE]\n\n"
NEUTRAL: Final[dict[str, tuple[Any, ...]]] = {
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "n": (1,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "top_logprobs": (0,),
}
"""Fields without a meaning here, with the values that change nothing."""


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
    fleet: AnswerOptions | None = None
    frequency_penalty: Any = None
    logit_bias: Any = None
    logprobs: Any = None
    metadata: Any = None
    n: Any = None
    presence_penalty: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    response_format: Any = None
    safety_identifier: Any = None
    service_tier: Any = None
    store: Any = None
    top_logprobs: Any = None
    user: Any = None

    @property
    def includes_usage(self) -> bool:
        """Whether the stream ends with an event that has the counts of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)


class TokenUsage(Struct, frozen=True, kw_only=True):
    """Counts of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


def token_usage(last_reply: Reply) -> TokenUsage:
    """Return the counts of tokens of an answer."""
    counts = last_reply.usage
    num_prompt = counts.prompt_tokens if counts else 0
    num_new = counts.tokens if counts else 0
    return TokenUsage(
        prompt_tokens=num_prompt, completion_tokens=num_new, total_tokens=num_prompt + num_new
    )


def check_openai(body: OpenAiSampling, neutral: dict[str, tuple[Any, ...]]) -> None:
    """Check the fields without a meaning here; `neutral` are those of the endpoint alone.

    Raises:
        RequestFieldError: one has a value that would change the answer.
    """
    check_neutral(body, NEUTRAL | neutral, ADVICE)
