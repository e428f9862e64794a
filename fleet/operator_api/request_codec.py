"""Requests of operations as parts of an HTTP request, and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple
from urllib.parse import quote, urlencode

import msgspec

from fleet.errors import ConfigError, DecodeError, RequestFieldError
from fleet.http_api.request_fields import convert_fields
from fleet.operator_api.operation import PATH_FIELD, PREFIX, Operation, Request
from fleet.utils.json_text import parse_json
from fleet.utils.text import text_of_payload
from fleet.utils.validation import JSON_ERRORS

NO_SEGMENTS: Final = ("", ".", "..")
"""Texts that a path cannot hold as one of its parts."""


class HttpParts(NamedTuple):
    """The path of a request with its query, and its body; None is no body."""

    path: str
    body: bytes | None


def encode_request(operation: Operation[Request, Any], request: Request) -> HttpParts:
    """Return the parts of a request.

    Raises:
        ConfigError: a field of the path has a text that no path can hold.
    """
    fields = msgspec.to_builtins(request)
    path = PATH_FIELD.sub(lambda match: _segment(match[1], fields.pop(match[1])), operation.path)
    if operation.has_body:
        return HttpParts(PREFIX + path, msgspec.json.encode(fields))
    given = {name: value for name, value in fields.items() if value is not None}
    query = urlencode({name: _text_of(value) for name, value in given.items()})
    return HttpParts(PREFIX + path + ("?" + query if query else ""), None)


def _segment(name: str, value: Any) -> str:
    text = _text_of(value)
    if text in NO_SEGMENTS:
        raise ConfigError(f"{name} {text!r}: expected a name")
    return quote(text, safe="")


def _text_of(value: Any) -> str:
    """Return the text of a value, of which `decode_request` makes the same value."""
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def decode_request(
    operation: Operation[Request, Any],
    path_fields: Mapping[str, str],
    query: Iterable[tuple[str, str]],
    body: bytes,
) -> Request:
    """Return the request that the parts of an HTTP request make.

    A field of the query without a value, as browsers send it, is left out.

    Raises:
        ConfigError: a field is unknown, missing, given twice or out of range; it is named.
        DecodeError: the body is no JSON object.
    """
    texts = _query_fields(operation, path_fields, query)
    try:
        if not operation.has_body:
            return convert_fields({**texts, **path_fields}, operation.request, strict=False)
        fields = _body_fields(body)
        _check_once(path_fields, fields)
        return convert_fields(
            fields | _converted(operation.request, path_fields), operation.request
        )
    except RequestFieldError as error:
        raise ConfigError(str(error)) from None


def _query_fields(
    operation: Operation[Any, Any], path_fields: Mapping[str, str], query: Iterable[tuple[str, str]]
) -> dict[str, str]:
    fields: dict[str, str] = {}
    for name, value in query:
        _check_once(path_fields, (name,))
        _check_once(fields, (name,))
        if operation.has_body:
            raise ConfigError(f"unknown field {name[:80]!r} in the query: put it into the body")
        fields[name] = value
    return {name: value for name, value in fields.items() if value}


def _check_once(known: Iterable[str], new: Iterable[str]) -> None:
    """Raise ConfigError for a field that is among both."""
    for name in set(known) & set(new):
        raise ConfigError(f"the field {name!r} is given twice; give it once")


def _body_fields(body: bytes) -> dict[str, Any]:
    try:
        fields: dict[str, Any] = parse_json(text_of_payload(body).strip() or "{}", dict[str, Any])
    except JSON_ERRORS as error:
        raise DecodeError(f"expected a JSON object as the body: {error}") from None
    return fields


def _converted(type_: type[msgspec.Struct], texts: Mapping[str, str]) -> dict[str, Any]:
    """Return the fields of a path, each in the type that the request has for it."""
    types = {field.name: field.type for field in msgspec.structs.fields(type_)}
    try:
        values = {
            name: msgspec.convert(text, types[name], strict=False) for name, text in texts.items()
        }
    except msgspec.ValidationError as error:
        raise ConfigError(f"the path has a wrong value: {error}") from None
    builtins: dict[str, Any] = msgspec.to_builtins(values)
    return builtins
