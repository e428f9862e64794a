"""Fields that Ollama's requests and responses share."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal

from msgspec import Meta, Struct

from fleet.http_api.answer_facts import FleetFacts, answer_facts, timings
from fleet.http_api.logprobs import ApiLogprob
from fleet.http_api.request_fields import check_neutral, convert_fields, prompt_fields
from fleet.protocol.prompt import AnswerOptions, JsonObject, Reply
from fleet.protocol.types import (
    Penalty,
    RepetitionPenalty,
    Share,
    StopText,
    StopTexts,
    Temperature,
    TopK,
    TopLogprobs,
    TopP,
)

NS: Final = 1_000_000  # nanoseconds in a millisecond
ADVICE: Final = "leave it out"
NEUTRAL: Final[dict[str, tuple[Any, ...]]] = {
    "think": (False,),
    "tools": ([],),
}
NEUTRAL_OPTIONS: Final[dict[str, tuple[Any, ...]]] = {
    "mirostat": (0,),
    "penalize_newline": (True, False),
    "tfs_z": (1,),
    "typical_p": (1,),
}
"""Fields and options without a meaning here, with the values that change nothing."""


class OllamaOptions(Struct, forbid_unknown_fields=True, kw_only=True):
    """The object `options` of a request. `fleet` has any option of a prompt.

    A `num_predict` or a `seed` below 0 lets the device choose. Options of memory, threads and
    the size of the context are the device's own.
    """

    num_predict: Annotated[int, Meta(ge=-2, le=100_000)] | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    stop: StopText | StopTexts | None = None
    seed: Annotated[int, Meta(ge=-1, le=(1 << 63) - 1)] | None = None
    min_p: Share | None = None
    repeat_penalty: RepetitionPenalty | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    fleet: AnswerOptions | None = None
    f16_kv: Any = None
    logits_all: Any = None
    low_vram: Any = None
    main_gpu: Any = None
    mirostat: Any = None
    mirostat_eta: Any = None
    mirostat_tau: Any = None
    num_batch: Any = None
    num_ctx: Any = None
    num_gpu: Any = None
    num_keep: Any = None
    num_thread: Any = None
    numa: Any = None
    penalize_newline: Any = None
    repeat_last_n: Any = None
    tfs_z: Any = None
    typical_p: Any = None
    use_mlock: Any = None
    use_mmap: Any = None
    vocab_only: Any = None


class OllamaBody(Struct, forbid_unknown_fields=True, kw_only=True):
    """The fields that requests for an answer share. `keep_alive` does not concern the device.

    Without `stream`, an answer is streamed.
    """

    model: str
    stream: bool | None = None
    options: JsonObject | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    format: Literal["", "json"] | JsonObject | None = None
    keep_alive: Any = None
    think: Any = None
    tools: Any = None

    @property
    def is_streamed(self) -> bool:
        """Whether the client wants one line for each token."""
        return self.stream is not False


class OllamaDuration(Struct, frozen=True, omit_defaults=True, kw_only=True):
    """The end of an answer: the reason, and counts with times in nanoseconds."""

    done_reason: str | None = None
    total_duration: int | None = None
    load_duration: int | None = None
    prompt_eval_count: int | None = None
    prompt_eval_duration: int | None = None
    eval_count: int | None = None
    eval_duration: int | None = None
    logprobs: tuple[ApiLogprob, ...] | None = None
    fleet: FleetFacts | None = None


def ollama_prompt_fields(body: OllamaBody) -> dict[str, Any]:
    """Return the fields of a prompt that `options` have.

    Raises:
        RequestFieldError: a field or an option would change the answer and has no meaning here.
    """
    check_neutral(body, NEUTRAL, ADVICE)
    options = convert_fields(_given(body.options), OllamaOptions, "options")
    check_neutral(options, NEUTRAL_OPTIONS, ADVICE)
    fields = prompt_fields(options, options.fleet) | prompt_fields(body)
    if body.format not in (None, ""):
        fields["response_format"] = _response_format(body.format)
    if options.repeat_penalty:
        fields["repetition_penalty"] = options.repeat_penalty
    if (options.seed or 0) < 0:
        del fields["seed"]
    if (options.num_predict or 0) > 0:
        fields["max_new_tokens"] = options.num_predict
    return fields


def _response_format(form: str | JsonObject | None) -> JsonObject:
    if isinstance(form, str):
        return {"type": "json_object"}
    return {"type": "json_schema", "json_schema": {"schema": form}}


def _given(options: JsonObject | None) -> JsonObject:
    return {name: value for name, value in (options or {}).items() if value is not None}


def ollama_end(reply: Reply, generation: str | None) -> dict[str, Any]:
    """Return the fields of the last line that report the counts and times of an answer."""
    facts = answer_facts(reply, generation)
    times = timings(reply.usage)
    if times is None:
        return {"done_reason": reply.finish_reason, "fleet": facts}
    prompt_ns = int(times.prompt_ms * NS)
    eval_ns = int(times.predicted_ms * NS)
    return {
        "done_reason": reply.finish_reason,
        "total_duration": prompt_ns + eval_ns,
        "load_duration": 0,
        "prompt_eval_count": times.prompt_n,
        "prompt_eval_duration": prompt_ns,
        "eval_count": times.predicted_n,
        "eval_duration": eval_ns,
        "fleet": facts,
    }


def ollama_time(seconds: float) -> str:
    """Return a time in seconds since 1970 as Ollama writes it (RFC 3339, UTC)."""
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")
