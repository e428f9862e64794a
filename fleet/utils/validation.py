"""Values of msgspec's types: those made in Python are checked, and errors list the choices."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final, TypeVar

import msgspec
from msgspec import Struct
from msgspec.inspect import (
    EnumType,
    LiteralType,
    StructType,
    UnionType,
    VarTupleType,
    type_info,
)

from fleet.errors import ConfigError

T = TypeVar("T", bound=Struct)
JSON_ERRORS: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""Errors of msgspec's decoder for bytes that are no JSON, not in UTF-8, or nested too deeply."""

FIELD: Final = re.compile(r"\.(\w+)")
CHOICE: Final = re.compile(r"Invalid enum value .* at `(\$[^`]*)`", re.DOTALL)


def validated(config: T) -> T:
    """Return a struct that was made in Python, each value in the type of its field.

    Raises:
        ConfigError: a value does not fit its field.
    """
    try:
        return msgspec.convert(msgspec.to_builtins(config), type(config))
    except msgspec.ValidationError as error:
        reason = describe_error(error, type(config))
        raise ConfigError(f"{type(config).__name__}: {reason}") from None


def describe_error(error: Exception, type_: Any) -> str:
    """Return the text of an error of msgspec; for a field with choices, with all of them."""
    match = CHOICE.search(str(error))
    choices = _choices(type_info(type_), FIELD.findall(match[1])) if match else []
    return f"{error}; expected one of {', '.join(choices)}" if choices else str(error)


def _choices(info: Any, path: Sequence[str]) -> list[str]:
    """Return the choices of the field at `path`, names of fields from `info` inwards."""
    match info:
        case UnionType():
            return [choice for each in info.types for choice in _choices(each, path)]
        case VarTupleType():
            return _choices(info.item_type, path)
        case StructType() if path:
            types = [each.type for each in info.fields if each.encode_name == path[0]]
            return [choice for each in types for choice in _choices(each, path[1:])]
        case EnumType():
            return [str(each.value) for each in info.cls]
        case LiteralType():
            return [str(each) for each in info.values]
    return []
