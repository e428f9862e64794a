"""What apps and sensors say to a device, and what it answers: plain JSON, so that they need no library of ours."""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta, Struct

from fleet.errors import PromptError
from fleet.protocol.messages import DeadlineMs, Sampling, Seed
from fleet.protocol.modes import Mode
from fleet.protocol.report import Switch

MAX_PROMPT_BYTES: Final = 256 * 1024

Threshold = Annotated[float, Meta(ge=0, le=1)]
Share = Annotated[float, Meta(ge=0, le=1)]
TargetTpotMs = Annotated[float, Meta(gt=0, le=600_000)]


class ChatMessage(Struct, frozen=True, forbid_unknown_fields=True):
    role: Literal["system", "user", "assistant"]
    content: str


class AnswerOptions(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What may be said of how an answer is made; what is not given, the device decides."""

    max_new_tokens: Annotated[int, Meta(ge=1, le=100_000)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=5)] = 0.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Meta(ge=0, le=1000)] = 0
    seed: Seed = 0
    mode: Mode | None = None
    threshold: Threshold | None = None
    thresholds: tuple[Threshold, ...] | None = None
    deadline_ms: DeadlineMs | None = None
    target_tpot_ms: TargetTpotMs | None = None
    min_agreement: Share | None = None
    max_offload_rate: Share | None = None
    ignore_eos: bool = False


class PromptRequest(AnswerOptions, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A request for one answer. Exactly one of `prompt` and `messages`."""

    prompt: str | None = None
    messages: tuple[ChatMessage, ...] | None = None

    @property
    def chat(self) -> tuple[ChatMessage, ...]:
        """The conversation, also when it came as one `prompt`."""
        return self.messages or (ChatMessage("user", self.prompt or ""),)

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_p, self.top_k, self.seed)


class ErrorInfo(Struct, frozen=True):
    code: str
    message: str


class Usage(Struct, frozen=True, kw_only=True):
    """Counts of one answer; times in milliseconds: to the first token, and per token after it.

    `round_trips` are the questions that the device waited for; `switches` what auto mode decided, and why.
    """

    prompt_tokens: int
    tokens: int
    sources: dict[str, int]
    offload_rate: float
    bytes_up: int
    bytes_down: int
    ttft_ms: float
    tpot_ms: float
    round_trips: int = 0
    drafted: int = 0
    switches: tuple[Switch, ...] = ()


class Reply(Struct, frozen=True, omit_defaults=True, kw_only=True):
    """One message of the answer's stream. The last one has `done`, and `usage` or `error`.

    `note` says why the cloud had no part in an answer that asked for it. The first one names the `generation`: the
    same request sent again brings the same replies again, unless the device has forgotten it and begins another.
    """

    seq: int
    text: str = ""
    token_id: int | None = None
    source: str | None = None
    done: bool = False
    finish_reason: str | None = None
    usage: Usage | None = None
    error: ErrorInfo | None = None
    bundle_id: str | None = None
    note: str | None = None
    generation: str | None = None


def parse_prompt(payload: bytes) -> PromptRequest:
    """A request out of a payload: a JSON object, or plain text that is the prompt.

    Raises:
        PromptError: too long, not UTF-8, malformed JSON, a field that is unknown or out of range, or no prompt.
    """
    if len(payload) > MAX_PROMPT_BYTES:
        raise PromptError(
            f"expected a prompt of at most {MAX_PROMPT_BYTES} bytes, got {len(payload)}; send a shorter one"
        )
    if payload.lstrip()[:1] == b"{":
        try:
            request = msgspec.json.decode(payload, type=PromptRequest)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise PromptError(
                f"expected a JSON object with 'prompt' or 'messages': {error}"
            ) from None
    else:
        try:
            request = PromptRequest(prompt=payload.decode())
        except UnicodeDecodeError as error:
            raise PromptError(f"expected UTF-8 text or a JSON object: {error}") from None
    if (request.prompt is None) == (request.messages is None):
        raise PromptError("expected exactly one of 'prompt' and 'messages'")
    if not any(message.content.strip() for message in request.chat):
        raise PromptError("the prompt is empty; send some text")
    return request


def decode_reply(payload: bytes) -> Reply:
    """Raises PromptError when it is no reply."""
    try:
        return msgspec.json.decode(payload, type=Reply)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise PromptError(f"expected a reply in JSON: {error}") from None
