"""Flaws of JSON, named by their field."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from fleet.utils.json_text import parse_json, parse_unique_json

FLAWS = {
    '{"a": {"mode": 1, "mode": 2}}': "'mode' is given twice; give it once",
    '{"a": 1e400}': "'a' is no finite number",
    '{"b": [0.5, [-1e400]]}': "'b' is no finite number",
    '{"a": NaN}': "'a' is no finite number",
    '{"a": "\\ud83d pair"}': "'a' has half of a surrogate pair",
    '{"\\ud83d": 1}': "has half of a surrogate pair",
    '["\\udc00"]': "the value has half of a surrogate pair",
    "-1e400": "the value is no finite number",
    " ": "expected JSON, got an empty text",
    '{"a": 1': "Input data was truncated",
    '{"a": 1}}': "trailing characters",
}


@pytest.mark.parametrize(("text", "words"), FLAWS.items())
def test_a_flaw_is_named_by_its_field(text: str, words: str) -> None:
    with pytest.raises(msgspec.DecodeError, match=words):
        parse_unique_json(text)


def test_only_unique_keys_are_left_to_the_caller() -> None:
    assert parse_json('{"a": 1, "a": 2}', dict[str, Any]) == {"a": 2}
    with pytest.raises(msgspec.DecodeError, match="'a' is no finite number"):
        parse_json('{"a": 1e400}', dict[str, Any])


def test_pairs_of_surrogates_and_keys_of_several_objects_are_no_flaws() -> None:
    text = '{"a": [{"name": "\\ud83d\\ude00"}, {"name": 1e300}], "name": null}'
    assert parse_unique_json(text)["a"] == [{"name": "\U0001f600"}, {"name": 1e300}]
