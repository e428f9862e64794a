"""Prompts of apps and sensors, and the replies of a device. Plain JSON needs no special library."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Annotated, Any, Final, Literal, TypeAlias

import msgspec
from msgspec import Meta, Struct
from msgspec.structs import replace

from fleet.errors import PromptError
from fleet.protocol.answer_trace import ReplyTrace
from fleet.protocol.constraint import Constraint, Regex, ResponseFormat, make_constraint
from fleet.protocol.counts import AnswerCounts
from fleet.protocol.messages import ChoiceRules, Sampling
from fleet.protocol.modes import Mode
from fleet.protocol.report import Switch
from fleet.protocol.types import (
    MAX_BIASES,
    Amount,
    Bias,
    DeadlineMs,
    MaxNewTokens,
    NumChoices,
    Penalty,
    RepetitionPenalty,
    Seed,
    Share,
    StopTexts,
    TargetTpotMs,
    Temperature,
    Threshold,
    TopK,
    TopLogprobs,
    TopP,
)
from fleet.utils.json_text import parse_json
from fleet.utils.text import is_blank, text_of_payload
from fleet.utils.validation import JSON_ERRORS, describe_error, is_unknown_field

MAX_PROMPT_BYTES: Final = 256 * 1024
MAX_FULL_TEXT_BYTES: Final = 256 * 1024


JsonObject: TypeAlias = dict[str, Any]
TokenKey: TypeAlias = Annotated[str, Meta(pattern=r"\A(0|[1-9][0-9]{0,9})\Z")]
LogitBiases: TypeAlias = Annotated[dict[TokenKey, Bias], Meta(max_length=MAX_BIASES)]
"""Biases by token id, which JSON writes as a text."""


class ChatMessage(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A message of a conversation, as chat templates of transformers read it.

    A message of the assistant with `tool_calls` may have no `content`. The result of a call is the
    `content` of a message with the role ``tool``.
    """

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    name: str | None = None
    tool_calls: tuple[JsonObject, ...] | None = None
    tool_call_id: str | None = None


class SamplingOptions(Struct, frozen=True, kw_only=True):
    """Options of the choice of each token. The device's settings decide on each that is None."""

    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: Share | None = None
    repetition_penalty: RepetitionPenalty | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None


class AnswerOptions(SamplingOptions, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of a response. The device chooses a value for each that is None.

    A response ends before the first of its `stop` texts. Without `stream` it is one reply with the
    whole text, and may have `n` choices, of which each has the next seed. With `logprobs`, the
    replies have the log-probability of each token, and those of the `top_logprobs` best tokens at
    its position.
    """

    max_new_tokens: MaxNewTokens | None = None
    seed: Seed | None = None
    response_format: ResponseFormat | None = None
    regex: Regex | None = None
    mode: Mode | None = None
    threshold: Threshold | None = None
    thresholds: tuple[Threshold, ...] | None = None
    deadline_ms: DeadlineMs | None = None
    target_tpot_ms: TargetTpotMs | None = None
    min_agreement: Share | None = None
    max_offload_rate: Share | None = None
    ignore_eos: bool = False
    stop: StopTexts = ()
    stream: bool = True
    logit_bias: LogitBiases | None = None
    logprobs: bool = False
    top_logprobs: TopLogprobs = 0
    n: NumChoices = 1

    @property
    def constraint(self) -> Constraint | None:
        """The form that the response must have, if any.

        Raises:
            PromptError: the fields contradict each other, or the schema is too large.
        """
        constraint = make_constraint(self.response_format, self.regex)
        if constraint and self.ignore_eos:
            raise PromptError(
                f"expected no 'ignore_eos' with {constraint.field!r}, whose answer has to end"
            )
        return constraint


class PromptRequest(
    AnswerOptions, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True
):
    """A request for one response. Exactly one of `prompt` and `messages` is given.

    With `raw` the response continues the text of `prompt`, in which names of control tokens are
    control tokens. `tools` and `documents` are for the chat template. With `trace` the replies have
    a trace of the answer.
    """

    prompt: str | None = None
    messages: tuple[ChatMessage, ...] | None = None
    raw: bool = False
    tools: tuple[JsonObject, ...] | None = None
    documents: tuple[JsonObject, ...] | None = None
    trace: bool = False

    @property
    def chat(self) -> tuple[ChatMessage, ...]:
        """The conversation; a `prompt` becomes a conversation of one message."""
        return self.messages or (ChatMessage("user", self.prompt or ""),)

    @property
    def needs_template(self) -> bool:
        """Whether the request has a field that only a chat template can put into a text."""
        fields = (self.messages, self.tools, self.documents)
        return any(field is not None for field in fields)

    @property
    def sampling(self) -> Sampling:
        """The options of the draw; a device fills in before what the request leaves out."""
        return Sampling(self.temperature or 0.0, self.top_p or 1.0, self.top_k or 0, self.seed or 0)

    @property
    def sampling_options(self) -> SamplingOptions:
        """The options of the choice of each token alone."""
        names = SamplingOptions.__struct_fields__
        return SamplingOptions(**{name: getattr(self, name) for name in names})

    def choice_rules(self, prompt_length: int) -> ChoiceRules:
        """Return the rules of a choice, after a prompt of `prompt_length` tokens."""
        biases = (self.logit_bias or {}).items()
        rules = ChoiceRules(
            min_p=self.min_p or 0.0,
            repetition_penalty=self.repetition_penalty or 1.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=tuple((int(token_id), bias) for token_id, bias in biases if bias),
            top_logprobs=self.top_logprobs,
            constraint=self.constraint,
        )
        return replace(rules, prompt_length=prompt_length) if rules.need_text else rules


class TopLogprob(Struct, frozen=True):
    """A token that was likely at a position, and its log-probability."""

    token: str
    token_id: int
    logprob: float


class TokenLogprob(TopLogprob, frozen=True, omit_defaults=True):
    """A token of a response with its log-probability, and the best tokens at its position.

    They are the model's at temperature 1, before penalties and biases.
    """

    top: tuple[TopLogprob, ...] = ()


class Choice(Struct, frozen=True, omit_defaults=True, kw_only=True):
    """One of several responses to a request. `full_text` is None if it is very long."""

    index: int
    full_text: str | None
    finish_reason: str
    logprobs: tuple[TokenLogprob, ...] | None = None


class ErrorInfo(Struct, frozen=True):
    code: str
    message: str


class Usage(AnswerCounts, frozen=True, kw_only=True):
    """Counts of one response; times in milliseconds: to the first token, and per token after it.

    `reused_tokens` are those of `prompt_tokens` that did not run again, because an earlier answer
    to this app had run them. `round_trips` are the verify requests that the device waited for;
    `switches` are the decisions of auto mode with their reasons; `seed` is the request's, or the
    one that the device chose. `mode` and `sampling` are those of the request or of the device. A
    device of an older version sends None.
    """

    offload_rate: float
    ttft_ms: float
    tpot_ms: float
    reused_tokens: Amount = 0
    round_trips: int = 0
    switches: tuple[Switch, ...] = ()
    seed: Seed | None = None
    mode: Mode | None = None
    sampling: SamplingOptions | None = None


class Reply(Struct, frozen=True, omit_defaults=True, kw_only=True):
    """A message of the response's stream. The last one has `done`, and `usage` or `error`.

    `confidence` is that of the device's exit which chose the token, also where the cloud confirmed
    it. `note` is the reason why the cloud did not contribute to a response that needed it. The
    first reply has the id of the `generation`. The same request sent again brings the same replies
    again, unless the device has dropped them: then it starts another generation. `full_text` is
    the text of all replies, in the last one; None if it is longer than `MAX_FULL_TEXT_BYTES`. The
    reply to a request without `stream` is the last one, unless its text is longer than that; it has
    the `logprobs` of all tokens, otherwise the reply with a token has its one. Several `choices`
    have the texts and log-probabilities instead. The `trace` is there if the request asks for it.
    """

    seq: int
    text: str = ""
    token_id: int | None = None
    source: str | None = None
    confidence: float | None = None
    done: bool = False
    finish_reason: str | None = None
    usage: Usage | None = None
    error: ErrorInfo | None = None
    bundle_id: str | None = None
    note: str | None = None
    generation: str | None = None
    full_text: str | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    choices: tuple[Choice, ...] | None = None
    trace: ReplyTrace | None = None


def parse_prompt(payload: bytes) -> PromptRequest:
    """Parse a request: a JSON object, or plain text that is the prompt.

    Raises:
        PromptError: the payload is too long, not UTF-8 or malformed JSON, has a field that is
            unknown or out of range, or has no prompt.
    """
    if len(payload) > MAX_PROMPT_BYTES:
        raise PromptError(
            f"expected a prompt of at most {MAX_PROMPT_BYTES} bytes, got {len(payload)}; "
            "send a shorter one"
        )
    return _checked(_parse(payload))


def prompt_of_fields(fields: dict[str, Any]) -> PromptRequest:
    """Return the request that has these fields, as decoded from JSON.

    Raises:
        PromptError: a field is unknown or out of range, or there is no prompt.
    """
    return _checked(_convert(fields))


def prompt_of_values(values: dict[str, Any]) -> PromptRequest:
    """Return the request that has these fields, made in Python: the one that a device would read.

    Raises:
        PromptError: a field is unknown or out of range, or there is no prompt, or no JSON can
            have a value.
    """
    try:
        # msgspec writes NaN as null, which leaves a field out.
        text = json.dumps(msgspec.to_builtins(values), allow_nan=False, ensure_ascii=False)
        payload = text.encode()
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise PromptError(f"expected fields that JSON can have: {error}; correct them") from None
    return parse_prompt(payload)


def _checked(request: PromptRequest) -> PromptRequest:
    if (request.prompt is None) == (request.messages is None):
        raise PromptError("expected exactly one of 'prompt' and 'messages'")
    if request.raw and request.needs_template:
        raise PromptError(
            "expected only 'prompt' with 'raw', got 'messages', 'tools' or 'documents'; "
            "a raw prompt is continued as it is"
        )
    _check_options(request)
    _check_contents(request.chat)
    _ = request.constraint  # raises the errors of its fields
    if all(is_blank(message.content or "") for message in request.chat):
        raise PromptError("the prompt is empty; send some text")
    return request


def _check_options(request: PromptRequest) -> None:
    if request.n > 1 and request.stream:
        raise PromptError(
            f"expected 'stream' false with 'n' {request.n}, got a stream; set it, or ask "
            f"{request.n} times"
        )
    if request.trace and not request.stream:
        raise PromptError("expected 'stream' true with 'trace', got false; leave one of them out")
    if request.top_logprobs and not request.logprobs:
        raise PromptError("expected 'logprobs' true with 'top_logprobs'; set it")


def _check_contents(messages: tuple[ChatMessage, ...]) -> None:
    for i, message in enumerate(messages):
        if message.content is None and message.tool_calls is None:
            raise PromptError(
                f"expected 'content', a text, in messages[{i}], got none or null; send some text"
            )


def _parse(payload: bytes) -> PromptRequest:
    try:
        text = text_of_payload(payload)
    except UnicodeDecodeError as error:
        raise PromptError(f"expected UTF-8 text or a JSON object: {error}") from None
    # Spaces of Unicode around the object, such as a page's no-break space, are no JSON.
    is_json = text.lstrip().startswith("{")
    return _parse_json(text.strip()) if is_json else _plain_prompt(text)


def _plain_prompt(text: str) -> PromptRequest:
    """Return the request for a plain text. Raises PromptError if it is JSON meant as a request."""
    value = None
    with suppress(*JSON_ERRORS):
        value = msgspec.json.decode(text) if text.lstrip()[:1] in ("[", '"') else None
    if isinstance(value, list) and any(isinstance(each, dict) for each in value):
        raise _no_prompt("got a list of objects; send it as 'messages' of an object")
    if isinstance(value, str) and value.lstrip().startswith("{"):
        raise _no_prompt("got an object inside a JSON text; encode the object once")
    return PromptRequest(prompt=text)


def _parse_json(text: str) -> PromptRequest:
    try:
        fields = parse_json(text, dict[str, Any])
    except (msgspec.MsgspecError, RecursionError) as error:
        raise _no_prompt(str(error)) from None
    return _convert(fields)


def _convert(fields: dict[str, Any]) -> PromptRequest:
    try:
        _join_parts(fields)
        return msgspec.convert(fields, PromptRequest)
    except (msgspec.MsgspecError, RecursionError) as error:
        reason = describe_error(error, PromptRequest, fields)
        if is_unknown_field(reason):
            reason += f"; its fields are {', '.join(PromptRequest.__struct_fields__)}"
        raise _no_prompt(reason) from None


def _no_prompt(reason: str) -> PromptError:
    return PromptError(f"expected a JSON object with 'prompt' or 'messages': {reason}")


def _join_parts(fields: dict[str, Any]) -> None:
    """Replace each content that is a list of text parts by their text, a line for each part.

    A field of another kind stays as it is; the conversion refuses it.
    """
    messages = fields.get("messages")
    for i, message in enumerate(messages if isinstance(messages, list) else ()):
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list):
            path = f"messages[{i}].content"
            message["content"] = "\n".join(
                _part_text(part, f"{path}[{k}]") for k, part in enumerate(content)
            )


def _part_text(part: Any, path: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else part
    if kind != "text":
        raise PromptError(
            f"expected a part of type 'text' at {path}, got {str(kind)[:80]!r}; send text only"
        )
    text = part.get("text")
    if not isinstance(text, str) or len(part) > 2:
        raise PromptError(f"expected only 'type' and 'text', a text, at {path}; send text only")
    return text


def decode_reply(payload: bytes) -> Reply:
    """Decode a reply. Raises PromptError."""
    try:
        return msgspec.json.decode(payload, type=Reply)
    except JSON_ERRORS as error:
        raise PromptError(f"expected a reply in JSON: {error}") from None
