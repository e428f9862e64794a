"""Characters and encodings of text from outside."""

from __future__ import annotations

import pytest

from fleet.utils.text import is_blank, wide_encoding

FILLERS = "\u034f\u115f\u1160\u17b4\u180b\u2800\u3164\ufe0f\uffa0\U000e0100"
OTHERS = " \t\0\u00a0\u00ad\u200b\u2028\u2060\u3000\ufeff\U000e0001"


@pytest.mark.parametrize("character", FILLERS + OTHERS)
def test_an_invisible_character_is_blank(character: str) -> None:
    assert is_blank(character * 2)
    assert not is_blank(f"{character}a{character}")


@pytest.mark.parametrize("text", ["1", "\uac00", "\u2801", "\U0001f600\ufe0f", "\u2764\ufe0f"])
def test_a_visible_character_is_not_blank(text: str) -> None:
    assert not is_blank(text)


@pytest.mark.parametrize("data", [b"", b"a", b"ab\0\0", b"\0\0\0\0", "\ufeffa".encode()])
def test_other_bytes_are_in_no_wide_encoding(data: bytes) -> None:
    assert wide_encoding(data) is None
