"""Log-probabilities of tokens, in the shapes that the APIs have for them."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from fleet.protocol.prompt import TokenLogprob, TopLogprob


class ApiTopLogprob(Struct, frozen=True, kw_only=True):
    """A token that was likely at a position; `bytes` are those of its text."""

    token: str
    logprob: float
    bytes: tuple[int, ...]


class ApiLogprob(ApiTopLogprob, frozen=True, kw_only=True):
    """A token of the answer, and the best tokens at its position."""

    top_logprobs: tuple[ApiTopLogprob, ...]


class ChatLogprobs(Struct, frozen=True, kw_only=True):
    """The log-probabilities of a chat completion."""

    content: tuple[ApiLogprob, ...]
    refusal: None = None


class TextLogprobs(Struct, frozen=True, kw_only=True):
    """The log-probabilities of a text completion; offsets count characters of the answer."""

    tokens: tuple[str, ...]
    token_logprobs: tuple[float, ...]
    top_logprobs: tuple[dict[str, float], ...]
    text_offset: tuple[int, ...]


def api_logprobs(logprobs: Sequence[TokenLogprob] | None) -> tuple[ApiLogprob, ...]:
    """Return log-probabilities as chat completions, responses and Ollama have them."""
    return tuple(
        ApiLogprob(
            token=each.token,
            logprob=each.logprob,
            bytes=tuple(each.token.encode()),
            top_logprobs=tuple(map(_top_logprob, each.top)),
        )
        for each in logprobs or ()
    )


def _top_logprob(top: TopLogprob) -> ApiTopLogprob:
    return ApiTopLogprob(token=top.token, logprob=top.logprob, bytes=tuple(top.token.encode()))


def chat_logprobs(logprobs: Sequence[TokenLogprob] | None) -> ChatLogprobs | None:
    """Return log-probabilities as chat completions have them; None without any."""
    return ChatLogprobs(content=api_logprobs(logprobs)) if logprobs else None


def text_logprobs(logprobs: Sequence[TokenLogprob] | None, offset: int = 0) -> TextLogprobs | None:
    """Return log-probabilities as text completions have them; None without any.

    `offset` is that of the first token.
    """
    if not logprobs:
        return None
    offsets = [offset]
    for each in logprobs[:-1]:
        offsets.append(offsets[-1] + len(each.token))
    return TextLogprobs(
        tokens=tuple(each.token for each in logprobs),
        token_logprobs=tuple(each.logprob for each in logprobs),
        top_logprobs=tuple({top.token: top.logprob for top in each.top} for each in logprobs),
        text_offset=tuple(offsets),
    )
