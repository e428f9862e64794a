"""Text and JSON of users: UTF-8 with or without a byte order mark, on every machine the same."""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import Any, Final

import msgspec

from fleet.errors import ConfigError
from fleet.utils.validation import describe_error

UTF_16: Final = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def decode_text(data: bytes, source: str) -> str:
    """Decode UTF-8; a byte order mark is skipped. `source` names the data in the error.

    Raises:
        ConfigError: the data is in another encoding.
    """
    if data.startswith(UTF_16) or b"\0" in data[:2]:
        raise ConfigError(f"{source} is in UTF-16, expected UTF-8; save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{source} is not in UTF-8 (byte {error.start}: {error.reason}); save it as UTF-8"
        ) from None


def read_text(path: Path, remedy: str) -> str:
    """Read a text file as UTF-8. Raises ConfigError; `remedy` ends the line of a missing file."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; {remedy}") from None
    return decode_text(data, str(path))


def decode_json(data: bytes, source: str, type_: Any = Any) -> Any:
    """Decode JSON in UTF-8 into a value of `type_`, which is a type of msgspec.

    Raises:
        ConfigError: the data is not JSON, not in UTF-8, or no value of `type_`.
    """
    text = decode_text(data, source)
    try:
        return msgspec.json.decode(text, type=type_)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ConfigError(f"{source} is not usable: {describe_error(error, type_)}") from None
