"""Values of msgspec's types: those made in Python are checked, and errors list the choices."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final, TypeVar

import msgspec
from msgspec import Struct
from msgspec.inspect import (
    BoolType,
    DictType,
    EnumType,
    FloatType,
    IntType,
    LiteralType,
    StrType,
    StructType,
    UnionType,
    VarTupleType,
    type_info,
)

from fleet.errors import ConfigError

T = TypeVar("T", bound=Struct)
MAX_VALUE: Final = 80  # characters of a value in an error
JSON_ERRORS: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""Errors of msgspec's decoder for bytes that are no JSON, not in UTF-8, or nested too deeply."""

FAULT: Final = re.compile(
    r"(?:Expected `(?P<expected>.*?)`(?:, got `(?P<kind>\w+)`)?[^`]*"
    r"|Invalid enum value (?P<choice>.*))"
    r" - at `\$\.(?P<path>[^`]*)`",
    re.DOTALL,
)
LENGTH: Final = re.compile(
    r"Expected `(?P<kind>str|array|object)` of length (?P<bound>[<>]=) (?P<length>\d+)"
    r" - at `\$\.(?P<path>[^`]*)`"
)
KEY: Final = re.compile(
    r"Expected `str` matching regex (?P<form>'.*') - at `key` in `\$\.(?P<path>[^`]*)`"
)
FORMS: Final = {repr(r"\A(0|[1-9][0-9]{0,9})\Z"): "whole numbers"}
"""Plain words for the regular expressions of keys."""

STEP: Final = re.compile(r"\w+|\[(?:\d+|\.\.\.)\]")
KINDS: Final = {
    "array": "a list",
    "bool": "true or false",
    "float": "a number",
    "int": "a whole number",
    "null": "null",
    "object": "an object",
    "str": "a text",
}
"""Plain words for the types in msgspec's errors."""


def validated(config: T) -> T:
    """Return a struct that was made in Python, each value in the type of its field.

    Raises:
        ConfigError: a value does not fit its field.
    """
    try:
        return msgspec.convert(msgspec.to_builtins(config), type(config))
    except msgspec.ValidationError as error:
        reason = describe_error(error, type(config), msgspec.to_builtins(config))
        raise ConfigError(f"{type(config).__name__}: {reason}") from None


def describe_error(error: Exception, type_: Any, values: Any = None) -> str:
    """Return the text of an error of msgspec; for a scalar field, in plain words.

    They are the field, its range or choices, and what came: its value if `values`, which were
    converted, are given.
    """
    if match := LENGTH.fullmatch(str(error)):
        return _length_words(match)
    if match := KEY.fullmatch(str(error)):
        form = FORMS.get(match["form"], f"texts of the form {match['form']}")
        return f"{match['path']}: expected {form} as keys"
    match = FAULT.fullmatch(str(error))
    steps = STEP.findall(match["path"]) if match else []
    words = list(filter(None, map(_words, _types_at(type_info(type_), steps))))
    if not match or not words or _is_about_length(match):
        return str(error)
    got = match["choice"] or _value_at(values, steps) or KINDS.get(match["kind"] or "", "")
    return f"{match['path']}: expected {' or '.join(words)}" + (f", got {got}" if got else "")


def _length_words(match: re.Match[str]) -> str:
    length = int(match["length"])
    unit = ("character" if match["kind"] == "str" else "item") + ("" if length == 1 else "s")
    bound = "at most" if match["bound"] == "<=" else "at least"
    what = KINDS[match["kind"]]
    return f"{match['path']}: expected {what} of {bound} {length:,} {unit}"


def _is_about_length(match: re.Match[str]) -> bool:
    """Whether the value has the right type, and its length or its characters do not fit."""
    is_compound = (match["expected"] or "").startswith(("str", "array", "object"))
    return is_compound and match["kind"] is None


def is_unknown_field(reason: str) -> bool:
    """Whether an error is about an unknown field of the value itself, not of one inside it."""
    return "unknown field" in reason and "$." not in reason


def _types_at(info: Any, steps: Sequence[str]) -> list[Any]:
    """Return the types of the field at `steps`, from `info` inwards."""
    match info:
        case UnionType():
            return [each for option in info.types for each in _types_at(option, steps)]
        case VarTupleType() if steps:
            return _types_at(info.item_type, steps[1:])
        case DictType() if steps:
            return _types_at(info.value_type, steps[1:])
        case StructType() if steps:
            types = [each.type for each in info.fields if each.encode_name == steps[0]]
            return [each for field in types for each in _types_at(field, steps[1:])]
    return [] if steps else [info]


def _words(info: Any) -> str | None:
    """Return what a field of a type expects; None if there are no plain words for it."""
    match info:
        case EnumType():
            return f"one of {', '.join(str(each.value) for each in info.cls)}"
        case LiteralType():
            return f"one of {', '.join(map(str, info.values))}"
        case BoolType():
            return KINDS["bool"]
        case IntType():
            return f"{KINDS['int']}{_range(info)}"
        case FloatType():
            return f"{KINDS['float']}{_range(info)}" + (", such as 0.8" if info.le == 1 else "")
        case VarTupleType():
            words = _words(info.item_type)
            return f"{KINDS['array']}, each of it {words}" if words else KINDS["array"]
        case StructType() | DictType():
            return KINDS["object"]
        case StrType():
            return KINDS["str"]
    return None


def _range(info: IntType | FloatType) -> str:
    if info.ge is not None and info.le is not None:
        return f" from {info.ge:,} to {info.le:,}"
    bounds = {"at least": info.ge, "above": info.gt, "at most": info.le, "below": info.lt}
    parts = [f"{word} {bound:,}" for word, bound in bounds.items() if bound is not None]
    return f" {' and '.join(parts)}" if parts else ""


def _value_at(values: Any, steps: Sequence[str]) -> str:
    """Return the value at `steps` as text; an empty one if there is none."""
    for step in steps:
        key = int(step[1:-1]) if step.strip("[]").isdecimal() and step[0] == "[" else step
        try:
            values = values[key]
        except (LookupError, TypeError):
            return ""
    return "null" if values is None else repr(values)[:MAX_VALUE]
