"""Facts about an answer that no other system has, and its times as llama.cpp reports them."""

from __future__ import annotations

from msgspec import Struct

from fleet.protocol.prompt import Reply, Usage


class FleetFacts(Struct, frozen=True, omit_defaults=True, kw_only=True):
    """The object `fleet` in a response: the origin of a token, or at the end of the whole answer.

    `source` is that of the token, and `confidence` that of the exit which chose it. At the end,
    `counts` has all numbers of the answer, `note` the reason why the cloud did not contribute, and
    `generation` its id in the fleet's reports.
    """

    source: str | None = None
    confidence: float | None = None
    counts: Usage | None = None
    bundle_id: str | None = None
    generation: str | None = None
    note: str | None = None


class Timings(Struct, frozen=True, kw_only=True):
    """Times of an answer, with the names of llama.cpp's server.

    `prompt_ms` is the time to the first token, with the time in the queue.
    """

    prompt_n: int
    prompt_ms: float
    prompt_per_token_ms: float
    prompt_per_second: float
    predicted_n: int
    predicted_ms: float
    predicted_per_token_ms: float
    predicted_per_second: float


def token_facts(reply: Reply) -> FleetFacts | None:
    """Return the facts of a token; None for a reply without a token."""
    if reply.source is None:
        return None
    return FleetFacts(source=reply.source, confidence=reply.confidence)


def answer_facts(last_reply: Reply, generation: str | None) -> FleetFacts:
    """Return the facts of a whole answer."""
    return FleetFacts(
        counts=last_reply.usage,
        bundle_id=last_reply.bundle_id,
        generation=generation,
        note=last_reply.note,
    )


def timings(usage: Usage | None) -> Timings | None:
    """Return the times of an answer."""
    if usage is None:
        return None
    num_later = max(0, usage.tokens - 1)
    return Timings(
        prompt_n=usage.prompt_tokens,
        prompt_ms=usage.ttft_ms,
        prompt_per_token_ms=usage.ttft_ms / max(1, usage.prompt_tokens),
        prompt_per_second=_per_second(usage.prompt_tokens, usage.ttft_ms),
        predicted_n=usage.tokens,
        predicted_ms=usage.tpot_ms * num_later,
        predicted_per_token_ms=usage.tpot_ms,
        predicted_per_second=_per_second(1, usage.tpot_ms),
    )


def _per_second(count: int, milliseconds: float) -> float:
    return 1000 * count / milliseconds if milliseconds else 0.0
