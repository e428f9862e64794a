"""Files of prompts: JSON lines of the common data sets, or plain text with one prompt a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fleet.errors import ConfigError


def read_prompts(path: Path) -> list[str]:
    """Prompts of a file, in order.

    In a ``.jsonl`` file each line is an object with `prompt`, or `instruction` and maybe `input`, or `turns` (the first
    is taken); in any other each line is a prompt.

    Raises:
        ConfigError: the file cannot be read, holds no prompt, or a line has none of these keys.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read prompts from {path}: {error}") from None
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            prompts.append(line.strip())
            continue
        try:
            prompts.append(prompt_of(json.loads(line)))
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise ConfigError(
                f"{path}:{number}: expected an object with 'prompt', or 'instruction' and 'input', or 'turns': {error}"
            ) from None
    if not prompts:
        raise ConfigError(f"{path} holds no prompts")
    return prompts


def prompt_of(row: dict[str, Any]) -> str:
    """The prompt in one row; LookupError or TypeError when there is none."""
    if "prompt" in row:
        return str(row["prompt"]).strip()
    if "turns" in row:
        return str(row["turns"][0]).strip()
    return "\n".join(
        filter(None, (str(row["instruction"]).strip(), str(row.get("input", "")).strip()))
    )
