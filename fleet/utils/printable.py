"""Text from outside, such as a device's or a model's, as text that a terminal prints as it is."""

from __future__ import annotations

import re
import shlex
from typing import Final

HIDDEN: Final = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""Control characters except tab and newline, marks of direction, and halves of surrogate pairs."""


def printable(text: str) -> str:
    """Return `text` with each control character shown as its escape, such as ``\\x1b``."""
    return HIDDEN.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def printable_line(text: object) -> str:
    """Return a path, a name or an error as one printable line."""
    return printable(str(text)).replace("\n", "\\n")


def print_line(text: object) -> None:
    """Print one line, whatever line breaks are in the names and paths of `text`."""
    print(printable_line(text))


def printable_json(text: str) -> str:
    """Return JSON with the same values, each control character in a text as its escape."""
    return HIDDEN.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def command_line(*words: object) -> str:
    """Return a command in backticks, each word quoted as a shell needs it."""
    return f"`{shlex.join(map(str, words))}`"


def count(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun: "1 answer", "1,200 answers", "0 identities"."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
