"""Triggers: rules that turn events into prompts. Plain functions without I/O.

A template has fields in braces, as in ``str.format``: a dotted path into the event's JSON and the
format of a number. A key of other characters is quoted in a path: ``{air.'PM2.5'}``. Paths lead
through plain data only, never to attributes of Python objects, and every length is bounded.
"""

from __future__ import annotations

import math
import operator
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Annotated, Any, Final, NamedTuple, TypeAlias

import msgspec
from msgspec import Meta

from fleet.errors import DecodeError, OversizedError, PromptError
from fleet.protocol import topics
from fleet.protocol.prompt import AnswerOptions, PromptRequest
from fleet.protocol.types import Id
from fleet.utils.json_text import parse_json
from fleet.utils.text import is_blank, text_of_payload
from fleet.utils.validation import JSON_ERRORS

MAX_EVENT_BYTES: Final = 16 * 1024
MAX_TRIGGERS: Final = 16
MAX_TEMPLATE: Final = 2000
MAX_TEXT: Final = 16 * 1024  # characters of a filled template

# Shorter than an id, because a request's id adds an epoch and a number to it.
TriggerName: TypeAlias = Annotated[str, Meta(pattern=r"\A[a-z0-9][a-z0-9_-]{0,31}\Z")]
Fields: TypeAlias = dict[str, Any]
Comparable: TypeAlias = int | float | str | bool | None

EVENTS: Final = re.compile(rf"{topics.NAME.pattern}/({topics.NAME.pattern}|\+)")
QUOTED: Final = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
STEP: Final = re.compile(rf"[\w-]+|{QUOTED}")
PATH: Final = rf"(?:[^\W\d][\w-]*|{QUOTED})(?:\.(?:[\w-]+|{QUOTED}))*"
SPEC: Final = r"[<>^]?\+?\d{0,2},?(?:\.\d{1,2})?[defgs%]?"
NUMERIC: Final = re.compile(r"[+,.%defg]|^[<>^]?0\d")
PIECE: Final = re.compile(rf"(\{{\{{|\}}\}}|[^{{}}]+)|\{{({PATH})(?::({SPEC}))?\}}", re.DOTALL)
CONDITION: Final = re.compile(rf"\s*({PATH})\s*(==|!=|<=|>=|<|>)\s*(.+?)\s*")
# A text of JSON, whole (the possessive forms never search again), or a bare word such as a number.
SCALAR: Final = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[^\s"\[\]{},:]+')
NUMBER: Final = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)
NAMES: Final = ("true", "false", "null")
REQUEST: Final = re.compile(r"([a-z0-9][a-z0-9_-]{0,31})-[0-9a-f]+-\d+", re.ASCII)  # of a trigger

ORDERS: Final[dict[str, Callable[[Any, Any], bool]]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
ORDERED_KINDS: Final = ("number", "text")


class Trigger(
    AnswerOptions, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True
):
    """A rule that turns the events of an app or a sensor into prompts.

    `events` is ``app/channel`` or ``app/+``. An event for which `when` holds fills the `template`.
    The device answers that prompt as if `reply_to` (None: the event's app) had sent it. It answers
    one event in `min_interval_s`, and at most `max_in_flight` at a time; others are dropped.
    """

    name: TriggerName
    events: str
    template: Annotated[str, Meta(min_length=1, max_length=MAX_TEMPLATE)]
    when: Annotated[str, Meta(max_length=200)] | None = None
    reply_to: Id | None = None
    min_interval_s: Annotated[float, Meta(ge=0, le=86_400)] = 0.0
    max_in_flight: Annotated[int, Meta(ge=1, le=64)] = 4

    def __post_init__(self) -> None:
        """Check the fields. A decoder reports the ValueError in its own error.

        Raises:
            ValueError: `events`, `template` or `when` is malformed.
        """
        if not EVENTS.fullmatch(self.events):
            raise ValueError(
                f"expected events like thermostat/warmth or thermostat/+, got {self.events[:80]!r}"
            )
        _pieces(self.template)
        if self.when is not None:
            _condition(self.when)

    def listens_to(self, app: str, channel: str) -> bool:
        """Whether the trigger's events include those of `app` on `channel`."""
        return topics.matches(self.events, f"{app}/{channel}")

    def is_due(self, fired_at: float, now: float) -> bool:
        """Whether the rate allows an event at `now`, in seconds, after the last at `fired_at`."""
        return now - fired_at >= self.min_interval_s

    def options(self) -> dict[str, Any]:
        """Return the options of the response as fields of a `PromptRequest`."""
        return {name: getattr(self, name) for name in AnswerOptions.__struct_fields__}


Triggers: TypeAlias = Annotated[tuple[Trigger, ...], Meta(max_length=MAX_TRIGGERS)]


class Piece(NamedTuple):
    """A piece of a template: text, or the field at `path`."""

    text: str
    path: str | None
    spec: str


class Condition(NamedTuple):
    """A comparison of the field at `path` with a value of JSON."""

    path: str
    order: str
    value: Comparable


def check_triggers(triggers: Iterable[Trigger]) -> None:
    """Check that each name is unique. Raises ValueError."""
    names = [trigger.name for trigger in triggers]
    duplicates = sorted({name for name in names if names.count(name) > 1})
    if duplicates:
        raise ValueError(f"expected unique trigger names, got {', '.join(duplicates)} repeatedly")


def event_filters(triggers: Sequence[Trigger]) -> set[str]:
    """Return the topic filters that match the events of all `triggers`, each event once."""
    pairs = {tuple(trigger.events.split("/")) for trigger in triggers}
    apps_with_wildcard = {app for app, channel in pairs if channel == topics.ANY}
    return {
        topics.app_event(app, channel)
        for app, channel in pairs
        if channel == topics.ANY or app not in apps_with_wildcard
    }


def read_event(channel: str, payload: bytes) -> Fields:
    """Return the fields of an event that a template may use.

    These are the fields of a JSON object, `channel`, and the whole text as `payload`. A field that
    is no finite number (``nan``, as some sensors write it) is null.

    Raises:
        OversizedError: the payload is too large.
        DecodeError: the payload is not UTF-8, or begins as a JSON object and is malformed.
    """
    if len(payload) > MAX_EVENT_BYTES:
        raise OversizedError(
            f"expected an event of at most {MAX_EVENT_BYTES} bytes, got {len(payload)}"
        )
    try:
        text = _unquoted(text_of_payload(payload).strip())
        fields = _decode_object(text) if text.startswith("{") else {}
    except JSON_ERRORS as error:
        raise DecodeError(f"expected an event in JSON or plain text: {error}") from None
    return {"payload": text, "channel": channel} | fields


def _unquoted(text: str) -> str:
    """Return the text that JSON in quotes holds; another text as it is."""
    if text.startswith('"'):
        with suppress(*JSON_ERRORS):
            return msgspec.json.decode(text, type=str).strip()
    return text


def _decode_object(text: str) -> Fields:
    """Decode an object. A bare word that is no value of JSON (``nan``, ``ovf``) becomes null."""
    try:
        return msgspec.json.decode(text, type=Fields)
    except msgspec.MsgspecError:
        with suppress(msgspec.MsgspecError):
            return msgspec.json.decode(SCALAR.sub(_value_or_null, text), type=Fields)
    return parse_json(text, Fields)  # fails, and names the flaw


def _value_or_null(match: re.Match[str]) -> str:
    word = match[0]
    if word.startswith('"') or word in NAMES:
        return word
    number = _as_number(word)
    return "null" if isinstance(number, str) else msgspec.json.encode(number).decode()


def make_prompt(trigger: Trigger, event: Fields) -> PromptRequest | None:
    """Return the request that an event becomes; None if the trigger's condition does not hold.

    Raises:
        PromptError: the event lacks a field or has another kind of value there, or the text is
            empty or too long.
    """
    if trigger.when is not None and not _holds(_condition(trigger.when), event):
        return None
    return PromptRequest(prompt=fill(trigger.template, event), **trigger.options())


def fill(template: str, event: Fields) -> str:
    """Replace the template's fields by the event's values. Raises PromptError as `make_prompt`."""
    text = ""
    for piece in _pieces(template):
        text += piece.text
        if piece.path:
            text += _format_value(piece, _look_up(piece.path, event))
        if len(text) > MAX_TEXT:
            raise PromptError(
                f"expected a prompt of at most {MAX_TEXT} characters; "
                "use fewer or shorter fields in the template"
            )
    if is_blank(text):
        raise PromptError("the event makes an empty prompt; add text to the template")
    return text


def request_name(trigger: Trigger, epoch: int, number: int) -> str:
    """Return the id of a request, unique for each event.

    `epoch` differs after every start of the device.
    """
    return f"{trigger.name}-{epoch:x}-{number}"


def trigger_of(request: str) -> str | None:
    """Return the name of the trigger that made a request; None for the requests of apps."""
    match = REQUEST.fullmatch(request)
    return match[1] if match else None


@lru_cache(maxsize=64)
def _pieces(template: str) -> tuple[Piece, ...]:
    template = _normal(template)
    pieces = []
    position = 0
    while position < len(template):
        match = PIECE.match(template, position)
        if not match:
            raise ValueError(
                "expected a field like {room}, {sensor.celsius:.1f} or {air.'PM2.5'} (a key of "
                f"other characters is quoted), got {template[position : position + 80]!r}; "
                "write a literal brace twice"
            )
        text = match[1] or ""
        pieces.append(Piece(text[:1] if text in ("{{", "}}") else text, match[2], match[3] or ""))
        position = match.end()
    return tuple(pieces)


@lru_cache(maxsize=64)
def _steps(path: str) -> tuple[str, ...]:
    return tuple(
        re.sub(r"\\(.)", r"\1", step[1:-1]) if step[0] in "'\"" else step
        for step in STEP.findall(path)
    )


@lru_cache(maxsize=64)
def _condition(when: str) -> Condition:
    match = CONDITION.fullmatch(_normal(when))
    try:
        value = msgspec.json.decode(match[3], type=Comparable) if match else None
    except msgspec.MsgspecError:
        match = None
    if match and match[2] in ORDERS and _kind(value) not in ORDERED_KINDS:
        raise ValueError(
            f"expected a number or a text in quotes after {match[2]}, got {match[3]}; "
            "compare other values with == or !="
        )
    if not match:
        raise ValueError(f'expected a condition like celsius > 30 or room == "attic", got {when!r}')
    return Condition(match[1], match[2], value)


def _holds(condition: Condition, event: Fields) -> bool:
    value = _look_up(condition.path, event)
    kind = _kind(condition.value)
    if kind == "number":
        value = _as_number(value)
    elif kind == "text" and isinstance(value, str):
        value = _normal(value)
    is_same_kind = _kind(value) == kind
    if condition.order in ("==", "!="):
        is_equal = is_same_kind and value == condition.value
        return is_equal is (condition.order == "==")
    if not is_same_kind:
        raise PromptError(
            f"expected a {kind} at {condition.path!r} of the event, got {_describe(value)}"
        )
    return ORDERS[condition.order](value, condition.value)


def _kind(value: object) -> str:
    match value:
        case bool():
            return "truth value"
        case int() | float():
            return "number"
        case str():
            return "text"
        case None:
            return "null"
    return "composite"


def _look_up(path: str, event: Fields) -> Any:
    try:
        return _find(event, _steps(path))
    except LookupError:
        raise PromptError(
            f"expected a field {path[:80]!r} in the event; send it, or change the trigger"
        ) from None


def _find(value: Any, steps: tuple[str, ...]) -> Any:
    """Return the value that the steps lead to. A key with dots may be several steps.

    Raises:
        LookupError: the steps lead to no value.
    """
    if not steps:
        return value
    if isinstance(value, list) and steps[0].isdecimal():
        return _find(value[int(steps[0])], steps[1:])
    fields = {_normal(key): each for key, each in value.items()} if isinstance(value, dict) else {}
    for num_steps in range(1, len(steps) + 1):
        key = ".".join(steps[:num_steps])
        if key in fields:
            with suppress(LookupError):
                return _find(fields[key], steps[num_steps:])
    raise LookupError


def _normal(text: str) -> str:
    """Return a text in Unicode's form NFC; a file name of macOS, for example, is in NFD."""
    return unicodedata.normalize("NFC", text)


def _format_value(piece: Piece, value: object) -> str:
    with suppress(ValueError, OverflowError, RecursionError):
        if _kind(value) in ORDERED_KINDS:
            return _format_scalar(value, piece.spec)
        if not piece.spec:
            return msgspec.json.encode(value).decode()
    raise PromptError(
        f"expected a value that fits {{{piece.path}:{piece.spec}}} in the event, "
        f"got {_describe(value)}"
    )


def _format_scalar(value: object, spec: str) -> str:
    """Format a number or a text; a text becomes a number if the format is one of numbers."""
    number = _as_number(value) if NUMERIC.search(spec) else value
    if spec.endswith("d") and isinstance(number, float) and number.is_integer():
        number = int(number)
    return format(number, spec)


def _describe(value: object) -> str:
    return "an object or a list" if _kind(value) == "composite" else repr(str(value)[:80])


def _as_number(value: Any) -> Any:
    """Return a text that is a number as that number, and any other value as it is."""
    if isinstance(value, str) and NUMBER.fullmatch(text := value.strip()):
        with suppress(ValueError):  # an integer of thousands of digits
            number = int(text) if text.lstrip("+-").isdecimal() else float(text)
            return number if isinstance(number, int) or math.isfinite(number) else value
    return value
