"""Triggers: which events a device answers, and the prompt that each becomes. Values in, values out, no I/O.

A template has fields in braces, as in ``str.format``: a dotted path into the event's JSON and a number's format. Paths
lead through plain data only, never to attributes of Python objects, and every length is bounded.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from string import Formatter
from typing import Annotated, Any, Final, NamedTuple, TypeAlias

import msgspec
from msgspec import Meta

from fleet.errors import DecodeError, OversizedError, PromptError
from fleet.protocol import topics
from fleet.protocol.messages import Id
from fleet.protocol.prompt import AnswerOptions, PromptRequest

MAX_EVENT_BYTES: Final = 16 * 1024
MAX_TRIGGERS: Final = 16
MAX_TEMPLATE: Final = 2000
MAX_TEXT: Final = 16 * 1024  # characters of a template that was filled

TriggerName: TypeAlias = Annotated[
    str, Meta(pattern=r"\A[a-z0-9][a-z0-9_-]{0,31}\Z")
]  # leaves a request's id room
Fields: TypeAlias = dict[str, Any]

EVENTS: Final = re.compile(rf"{topics.NAME.pattern}/({topics.NAME.pattern}|\+)")
PATH: Final = re.compile(r"[^\W\d][\w-]*(?:\.[\w-]+)*")
SPEC: Final = re.compile(r"[<>^]?\+?\d{0,2},?(\.\d{1,2})?[defgs%]?")
CONDITION: Final = re.compile(rf"\s*({PATH.pattern})\s*(==|!=|<=|>=|<|>)\s*(.+?)\s*")

ORDERS: Final[dict[str, Callable[[Any, Any], bool]]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


class Trigger(
    AnswerOptions, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True
):
    """What a device does when an app or a sensor says something.

    `events` is ``app/channel`` or ``app/+``. An event for which `when` holds fills the `template`, and the device
    answers that as if `reply_to` (the event's app, when it is None) had asked. It answers one event in
    `min_interval_s`, and at most `max_in_flight` at a time; those beyond are dropped.
    """

    name: TriggerName
    events: str
    template: Annotated[str, Meta(min_length=1, max_length=MAX_TEMPLATE)]
    when: Annotated[str, Meta(max_length=200)] | None = None
    reply_to: Id | None = None
    min_interval_s: Annotated[float, Meta(ge=0, le=86_400)] = 0.0
    max_in_flight: Annotated[int, Meta(ge=1, le=64)] = 4

    def __post_init__(self) -> None:
        """Raises ValueError, which a decoder reports in its own error, for what is no events, template or condition."""
        if not EVENTS.fullmatch(self.events):
            raise ValueError(
                f"expected events like thermostat/warmth or thermostat/+, got {self.events[:80]!r}"
            )
        _pieces(self.template)
        if self.when is not None:
            _condition(self.when)

    def takes(self, app: str, channel: str) -> bool:
        """Whether an event of that app and channel is one of ours."""
        return topics.matches(self.events, f"{app}/{channel}")

    def is_due(self, answered_at: float, now: float) -> bool:
        """Whether the rate allows one at `now`, in seconds, after the last at `answered_at`."""
        return now - answered_at >= self.min_interval_s

    def options(self) -> dict[str, Any]:
        """How the answer is to be made, as fields of a `PromptRequest`."""
        return {name: getattr(self, name) for name in AnswerOptions.__struct_fields__}


Triggers: TypeAlias = Annotated[tuple[Trigger, ...], Meta(max_length=MAX_TRIGGERS)]


class Piece(NamedTuple):
    """A part of a template: text, then a field unless its path is empty."""

    text: str
    path: str
    spec: str


class Condition(NamedTuple):
    """`path` compared with a value of JSON."""

    path: str
    order: str
    value: float | str | bool | None


def check_triggers(triggers: Iterable[Trigger]) -> None:
    """Raises ValueError when two have one name."""
    names = [trigger.name for trigger in triggers]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"expected a name of its own for each trigger, got {', '.join(twice)} more than once"
        )


def event_filters(triggers: Sequence[Trigger]) -> set[str]:
    """The topic filters that bring the events of all `triggers`, each event once."""
    wanted = {trigger.events for trigger in triggers}
    whole = {events.partition("/")[0] for events in wanted if events.endswith("/+")}
    return {
        topics.event(*events.split("/"))
        for events in wanted
        if events.endswith("/+") or events.partition("/")[0] not in whole
    }


def read_event(channel: str, payload: bytes) -> Fields:
    """What a template may use: the fields of a JSON object, `channel`, and the whole text as `payload`.

    A payload that is nothing but a number is that number.

    Raises:
        OversizedError: it is too large.
        DecodeError: it begins as a JSON object and is none, or it is no text.
    """
    if len(payload) > MAX_EVENT_BYTES:
        raise OversizedError(
            f"expected an event of at most {MAX_EVENT_BYTES} bytes, got {len(payload)}"
        )
    try:
        text = payload.decode().strip()
        fields = msgspec.json.decode(text, type=Fields) if text.startswith("{") else {}
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DecodeError(f"expected an event in JSON or plain text: {error}") from None
    return {"payload": _number(text), "channel": channel} | fields


def make_prompt(trigger: Trigger, event: Fields) -> PromptRequest | None:
    """The request that an event becomes, None when the trigger's condition does not hold.

    Raises:
        PromptError: the event lacks a field or has another kind of value there, or the text is empty or too long.
    """
    if trigger.when is not None and not _holds(_condition(trigger.when), event):
        return None
    return PromptRequest(prompt=fill(trigger.template, event), **trigger.options())


def fill(template: str, event: Fields) -> str:
    """The template with the event's values in the place of its fields; raises PromptError as `make_prompt` does."""
    text = ""
    for piece in _pieces(template):
        text += piece.text + (_show(piece, _look_up(piece.path, event)) if piece.path else "")
        if len(text) > MAX_TEXT:
            raise PromptError(
                f"expected a prompt of at most {MAX_TEXT} characters; let the template use less of it"
            )
    if not text.strip():
        raise PromptError("the event makes an empty prompt; put words into the template")
    return text


def request_name(trigger: Trigger, epoch: int, number: int) -> str:
    """The request's id: another for each event, also after the device has started again with another `epoch`."""
    return f"{trigger.name}-{epoch:x}-{number}"


@lru_cache(maxsize=64)
def _pieces(template: str) -> tuple[Piece, ...]:
    pieces = []
    for text, path, spec, conversion in Formatter().parse(template):
        if path is not None and not PATH.fullmatch(path):
            raise ValueError(
                f"expected a field like {{room}} or {{sensor.celsius:.1f}}, got {{{path}}}"
            )
        if conversion or not SPEC.fullmatch(spec or ""):
            raise ValueError(
                f"expected a format like .1f after {{{path}: , got {spec or '!' + str(conversion)!r}"
            )
        pieces.append(Piece(text, path or "", spec or ""))
    return tuple(pieces)


@lru_cache(maxsize=64)
def _condition(when: str) -> Condition:
    match = CONDITION.fullmatch(when)
    try:
        value = msgspec.json.decode(match[3], type=float | str | bool | None) if match else None
    except msgspec.MsgspecError:
        match = None
    if not match:
        raise ValueError(f'expected a condition like celsius > 30 or room == "attic", got {when!r}')
    return Condition(match[1], match[2], value)


def _holds(condition: Condition, event: Fields) -> bool:
    path, order, wanted = condition
    value = _look_up(path, event)
    if order in ("==", "!="):
        return (_kind(value) == _kind(wanted) and value == wanted) is (order == "==")
    if _kind(value) != _kind(wanted) or _kind(wanted) not in ("number", "text"):
        raise PromptError(
            f"expected a {_kind(wanted)} at {path!r} of the event, got {_shown(value)}"
        )
    return ORDERS[order](value, wanted)


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
    value: Any = event
    for step in path.split("."):
        if isinstance(value, dict) and step in value:
            value = value[step]
        elif isinstance(value, list) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        else:
            raise PromptError(
                f"expected a field {path[:80]!r} in the event; send it, or change the trigger"
            )
    return value


def _show(piece: Piece, value: object) -> str:
    try:
        if _kind(value) in ("number", "text"):
            return format(value, piece.spec)
        if not piece.spec:
            return msgspec.json.encode(value).decode()
    except (ValueError, OverflowError, RecursionError):
        pass
    raise PromptError(
        f"expected a value that fits {{{piece.path}:{piece.spec}}} in the event, got {_shown(value)}"
    )


def _shown(value: object) -> str:
    return "an object or a list" if _kind(value) == "composite" else repr(str(value)[:80])


def _number(text: str) -> float | str:
    try:
        return msgspec.json.decode(text, type=int | float)
    except msgspec.MsgspecError:
        return text
