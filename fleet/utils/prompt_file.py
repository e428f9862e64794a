"""Files of prompts: JSON lines of the common data sets, or plain text with one prompt a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fleet.errors import ConfigError


def read_prompts(path: Path) -> list[str]:
    """Read the prompts of a file, in order.

    In a ``.jsonl`` file each line is an object with `prompt`, or `instruction` and optionally
    `input`, or `turns` (the first is used); in any other file each line is a prompt.

    Raises:
        ConfigError: the file cannot be read, holds no prompt, or a line has none of these keys.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read prompts from {path}: {error}") from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise ConfigError(f"{path} holds no prompts")
    if path.suffix != ".jsonl":
        return [line.strip() for _, line in numbered]
    return [_parse_line(f"{path}:{number}", line) for number, line in numbered]


def _parse_line(place: str, line: str) -> str:
    try:
        return prompt_of(json.loads(line))
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ConfigError(
            f"{place}: expected an object with 'prompt', or 'instruction' and 'input', "
            f"or 'turns': {error}"
        ) from None


def prompt_of(row: dict[str, Any]) -> str:
    """The prompt of one row; raises LookupError or TypeError when it has none."""
    if "prompt" in row:
        return str(row["prompt"]).strip()
    if "turns" in row:
        return str(row["turns"][0]).strip()
    texts = (str(row["instruction"]).strip(), str(row.get("input", "")).strip())
    return "\n".join(filter(None, texts))
