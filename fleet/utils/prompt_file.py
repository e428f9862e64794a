"""Files of prompts: JSON lines of the common data sets, or plain text with one prompt a line."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from fleet.errors import ConfigError
from fleet.utils.json_text import parse_unique_json
from fleet.utils.text import is_blank
from fleet.utils.text_files import decode_text, read_bytes
from fleet.utils.validation import JSON_ERRORS

JSON_LINES: Final = (".jsonl", ".ndjson")
FORM: Final = (
    "expected an object with 'prompt', or the texts 'instruction' and 'input', "
    "or 'turns', a list of texts"
)


class PromptFile(NamedTuple):
    """The prompts of a file, and its SHA-256. A pipe can be read only once."""

    sha256: str
    texts: list[str]

    @classmethod
    def read(cls, path: Path) -> PromptFile:
        """Read a file as `read_prompts` does. Raises ConfigError."""
        data = read_bytes(path, "give a file of prompts")
        return cls(hashlib.sha256(data).hexdigest(), _parse_prompts(path, data))


def read_prompts(path: Path) -> list[str]:
    """Read the prompts of a file, in order.

    In a ``.jsonl`` file each line is an object with `prompt`, or `instruction` and optionally
    `input`, or `turns` (the first is used); in any other file each line is a prompt.

    Raises:
        ConfigError: the file cannot be read, holds no prompt, or a line has none of these keys.
    """
    return PromptFile.read(path).texts


def _parse_prompts(path: Path, data: bytes) -> list[str]:
    suffix = path.suffix.lower()
    if suffix == ".json":
        raise ConfigError(f"{path}: expected one prompt a line, as text or in a file *.jsonl")
    text = decode_text(data, str(path)).replace("\r\n", "\n").replace("\r", "\n")
    lines = [
        (number, line) for number, line in enumerate(text.split("\n"), 1) if not is_blank(line)
    ]
    if not lines:
        raise ConfigError(f"{path} holds no prompts")
    if suffix not in JSON_LINES:
        return [line.strip() for _, line in lines]
    return [_parse_line(f"{path}:{number}", line) for number, line in lines]


def _parse_line(place: str, line: str) -> str:
    try:
        return prompt_of(parse_unique_json(line))
    except (*JSON_ERRORS, TypeError) as error:
        raise ConfigError(f"{place}: {FORM}: {error}") from None


def prompt_of(row: Any) -> str:
    """Return the prompt of one row; raise TypeError when it has none."""
    if not isinstance(row, Mapping):
        raise TypeError(f"got {_kind(row)}")
    if "prompt" in row:
        return _text(row, "prompt")
    if "turns" in row:
        turns = row["turns"]
        if not isinstance(turns, list) or not turns:
            raise TypeError(f"'turns' is {_kind(turns)}")
        return _text({"turns": turns[0]}, "turns")
    if "instruction" not in row:
        raise TypeError(f"got the keys {', '.join(row)[:80] or 'none'}")
    instruction = _text(row, "instruction")
    if row.get("input") in (None, ""):
        return instruction
    return f"{instruction}\n{_text(row, 'input')}"


def _text(row: Mapping[str, Any], key: str) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise TypeError(f"{key!r} is {_kind(value)}")
    if is_blank(value):
        raise TypeError(f"{key!r} has no visible character")
    return value.strip()


def _kind(value: object) -> str:
    return msgspec.json.encode(value).decode()[:80]
