"""Prompts in the usual files, and the error of a bad line."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from fleet.errors import ConfigError
from fleet.utils.prompt_file import PromptFile, read_prompts
from tests.pipes import in_pipe


def test_prompts_are_read_in_every_form(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    text = tmp_path / "prompts.txt"
    rows = [
        {"prompt": "one"},
        {"instruction": "two", "input": "three"},
        {"instruction": "four"},
        {"turns": ["five"]},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    text.write_text("six\n\nseven\n")
    assert read_prompts(path) + read_prompts(text) == [
        "one",
        "two\nthree",
        "four",
        "five",
        "six",
        "seven",
    ]
    path.write_text('{"prompt": "one"}\n{"text": "two"}\n')
    with pytest.raises(ConfigError, match=r"prompts\.jsonl:2: expected an object with 'prompt'"):
        read_prompts(path)


def test_a_file_without_prompts_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.txt"
    path.write_text("\n\u200b\n\ufeff\u2800\n")
    with pytest.raises(ConfigError, match="holds no prompts"):
        read_prompts(path)
    with pytest.raises(ConfigError, match=r"cannot read .*absent.txt: No such file"):
        read_prompts(tmp_path / "absent.txt")


MARK = "\ufeff"


def read(tmp_path: Path, name: str, text: str) -> list[str]:
    path = tmp_path / name
    path.write_bytes(text.encode())
    return read_prompts(path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", f"{MARK}Name a fruit.\r\nName a tree.\r\n"),
        ("a.txt", "Name a fruit.\rName a tree.\r"),
        ("a.jsonl", f'{MARK}{{"prompt": "Name a fruit."}}\n{{"prompt": "Name a tree."}}\n'),
        ("A.JSONL", '{"instruction": "Name a fruit.", "input": null}\n{"turns": ["Name a tree."]}'),
    ],
)
def test_a_mark_a_line_ending_and_a_suffix_make_no_difference(
    tmp_path: Path, name: str, text: str
) -> None:
    assert read(tmp_path, name, text) == ["Name a fruit.", "Name a tree."]


def test_only_the_end_of_a_line_ends_a_prompt(tmp_path: Path) -> None:
    assert read(tmp_path, "a.txt", "a\x1cb\u2028c\n") == ["a\x1cb\u2028c"]


@pytest.mark.parametrize(
    "row",
    [
        '{"prompt": null}',
        '{"prompt": ["a", "b"]}',
        '{"prompt": {"a": 1}}',
        '{"prompt": 5}',
        '{"prompt": ""}',
        '{"prompt": NaN}',
        '{"prompt": "half \\ud83d pair"}',
        '{"prompt": "a", "prompt": "b"}',
        '{"prompt": "\\u200b\\u0000"}',
        '{"turns": ["\\u3164"]}',
        '{"turns": [{"content": "hi"}]}',
        '{"turns": []}',
        '{"instruction": "x", "input": false}',
        '{"messages": []}',
        "5",
    ],
)
def test_a_row_without_a_text_is_refused_with_its_line(tmp_path: Path, row: str) -> None:
    with pytest.raises(ConfigError, match=r"a\.jsonl:2: expected an object with 'prompt'"):
        read(tmp_path, "a.jsonl", f'{{"prompt": "fine"}}\n{row}\n')


def test_a_document_of_json_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a\.json: expected one prompt a line"):
        read(tmp_path, "a.json", '["one", "two"]')


def test_a_pipe_is_read_once_for_its_prompts_and_their_hash() -> None:
    data = b"Why?\nHow?\n"
    with in_pipe(data) as path:
        assert PromptFile.read(path) == (hashlib.sha256(data).hexdigest(), ["Why?", "How?"])
