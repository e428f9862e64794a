"""Text from outside on a terminal."""

from __future__ import annotations

import shlex
from pathlib import Path

import msgspec
import pytest

from fleet.utils.printable import command_line, count, printable, printable_json


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain [bold] :smile: {x}\n\ttext é 字", "plain [bold] :smile: {x}\n\ttext é 字"),
        ("\x1b[31mred\x1b]0;title\x07", "\\x1b[31mred\\x1b]0;title\\x07"),
        ("over\rwritten\x7f\x9b", "over\\rwritten\\x7f\\x9b"),
        ("\u202eevil \u061c", "\\u202eevil \\u061c"),
        ("half \ud83d", "half \\ud83d"),
    ],
)
def test_control_characters_are_shown_and_all_else_stays(text: str, shown: str) -> None:
    assert printable(text) == shown
    printable(text).encode()


def test_json_keeps_its_values_and_holds_no_control_character() -> None:
    value = {"mode": "\x9b31m \u202e\u061c\x7f\x1b é\n"}
    text = printable_json(msgspec.json.encode(value).decode())
    assert printable(text) == text
    assert msgspec.json.decode(text) == value


def test_a_noun_follows_its_number() -> None:
    assert [count(n, "answer") for n in (0, 1, 1200)] == ["0 answers", "1 answer", "1,200 answers"]
    assert count(2, "identity", "identities") == "2 identities"


def test_a_command_is_quoted_as_a_shell_needs_it() -> None:
    line = command_line("edge-agent", "run", Path("/srv/my device"))
    assert shlex.split(line.strip("`")) == ["edge-agent", "run", "/srv/my device"]
