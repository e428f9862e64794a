"""JSON from outside, with errors that name the field and the flaw of its value."""

from __future__ import annotations

import json
import math
import re
from contextlib import suppress
from typing import Any, Final, TypeVar

import msgspec

T = TypeVar("T")
HALF_PAIR: Final = re.compile("[\ud800-\udfff]")


def parse_json(data: str | bytes, type_: type[T]) -> T:
    """Decode JSON into a value of `type_`, a type of msgspec. Of equal keys the last one counts.

    Raises:
        msgspec.MsgspecError: the data is not JSON, or no value of `type_`.
        UnicodeDecodeError: the data is not UTF-8.
        RecursionError: the data is nested too deeply.
    """
    try:
        return msgspec.json.decode(data, type=type_)
    except msgspec.DecodeError:
        check_json(data)
        raise


def parse_unique_json(text: str, type_: Any = Any) -> Any:
    """Decode JSON as `parse_json` does, and refuse an object that has a key twice."""
    check_json(text)
    return msgspec.json.decode(text, type=type_)


def check_json(data: str | bytes) -> None:
    """Check data for the flaws that msgspec has no plain words for, or does not report.

    Raises:
        msgspec.DecodeError: the data is empty, or an object has a key twice, a number that is not
            finite, or a text with half of a surrogate pair.
    """
    if not data.strip():
        raise msgspec.DecodeError("expected JSON, got an empty text")
    # A text that is malformed otherwise is left to msgspec.
    with suppress(json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        flaw = _flaw(json.loads(data, object_pairs_hook=_check_object, parse_int=float))
        if flaw:
            raise msgspec.DecodeError(f"the value {flaw}")


def _check_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for key, value in pairs:
        flaw = "is given twice; give it once" if key in fields else _flaw(key) or _flaw(value)
        if flaw:
            raise msgspec.DecodeError(f"{key[:80]!r} {flaw}")
        fields[key] = value
    return fields


def _flaw(value: object) -> str | None:
    match value:
        case float() if not math.isfinite(value):
            return "is no finite number"
        case str() if HALF_PAIR.search(value):
            return "has half of a surrogate pair of UTF-16"
        case list():
            return next(filter(None, map(_flaw, value)), None)
    return None
