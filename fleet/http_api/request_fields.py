"""Fields of request bodies: decoded, and refused where ignoring them would change the answer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final, TypeVar

import msgspec
from msgspec import Struct

from fleet.errors import DecodeError, RequestFieldError
from fleet.protocol.prompt import AnswerOptions
from fleet.utils.json_text import parse_json
from fleet.utils.text import text_of_payload
from fleet.utils.validation import JSON_ERRORS, describe_error

B = TypeVar("B", bound=Struct)

UNKNOWN_FIELD: Final = re.compile(r"Object contains unknown field `(.*?)`(?: - at `\$\.?(.*)`)?")
MISSING_FIELD: Final = re.compile(r"Object missing required field `(.*?)`(?: - at `\$\.?(.*)`)?")
FIELD_PATH: Final = re.compile(r"[\w.\[\]]+(?=: )|(?<=`\$\.)[^`]+")
COPIED: Final = frozenset(AnswerOptions.__struct_fields__) - {"stream"}
"""Fields that reach the device as they are. Each answer reaches an API as a stream."""


def decode_object(data: bytes) -> dict[str, Any]:
    """Decode the object of a body, without its fields that are null.

    Raises:
        DecodeError: the body is no JSON object.
    """
    try:
        fields = parse_json(text_of_payload(data).strip(), dict[str, Any])
    except JSON_ERRORS as error:
        raise DecodeError(f"expected a JSON object as the body: {error}") from None
    return {name: value for name, value in fields.items() if value is not None}


def convert_fields(
    fields: Mapping[str, Any], type_: type[B], path: str = "", *, strict: bool = True
) -> B:
    """Convert decoded fields to the struct of a body; `path` leads to the fields.

    Without `strict` a text may stand for a number or a truth value.

    Raises:
        RequestFieldError: a field is missing, unknown or out of range.
    """
    try:
        return msgspec.convert(fields, type_, strict=strict)
    except msgspec.ValidationError as error:
        raise _field_error(error, type_, fields, path) from None


def _field_error(
    error: msgspec.ValidationError, type_: type[Struct], fields: Mapping[str, Any], path: str
) -> RequestFieldError:
    text = str(error)
    if match := UNKNOWN_FIELD.fullmatch(text):
        name = _joined(path, match[2], match[1])
        return RequestFieldError(name, f"unknown field {name!r}: leave it out")
    if match := MISSING_FIELD.fullmatch(text):
        name = _joined(path, match[2], match[1])
        return RequestFieldError(name, f"expected the field {name!r}, got none; add it")
    reason = describe_error(error, type_, dict(fields))
    found = FIELD_PATH.search(reason)
    return RequestFieldError(_joined(path, found[0] if found else ""), _joined(path, reason))


def _joined(*steps: str | None) -> str:
    return ".".join(filter(None, steps))


def check_neutral(body: Struct, neutral: Mapping[str, tuple[Any, ...]], advice: str) -> None:
    """Check that fields without a meaning here are left out, or have a value that changes nothing.

    Raises:
        RequestFieldError: one has another value; the message ends with `advice`.
    """
    for name, values in neutral.items():
        value = getattr(body, name)
        if value is not None and value not in values:
            raise unsupported(name, values, advice)


def unsupported(field: str, values: Iterable[Any], advice: str) -> RequestFieldError:
    """Return the error for a field that has no meaning here."""
    allowed = " or ".join(msgspec.json.encode(value).decode() for value in values if value)
    reason = f"only {allowed} is possible" if allowed else "it is not supported"
    return RequestFieldError(field, f"{field}: {reason} here; {advice}")


def prompt_fields(body: Struct, fleet: AnswerOptions | None = None) -> dict[str, Any]:
    """Return the fields of a prompt that a body has under the same names; `fleet` has more.

    The field `stop` may be one text.
    """
    extra = msgspec.to_builtins(fleet) if fleet else {}
    fields = {name: getattr(body, name) for name in body.__struct_fields__ if name in COPIED}
    given = {
        name: msgspec.to_builtins(value) for name, value in fields.items() if value is not None
    }
    stop = given.get("stop")
    if isinstance(stop, str):
        given["stop"] = [stop] if stop else []
    return extra | given | {"stream": True}
