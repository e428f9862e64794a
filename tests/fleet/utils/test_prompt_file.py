"""Prompts in the usual files, and the error of a bad line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fleet.errors import ConfigError
from fleet.utils.prompt_file import read_prompts


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
    path.write_text("\n\n")
    with pytest.raises(ConfigError, match="holds no prompts"):
        read_prompts(path)
    with pytest.raises(ConfigError, match="cannot read prompts"):
        read_prompts(tmp_path / "absent.txt")
