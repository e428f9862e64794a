"""Sets of prompts for `fleet bench drafts`: events of sensors, and texts of a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from fleet.protocol.prompt import PromptRequest
from fleet.protocol.triggers import Trigger, make_prompt
from fleet.utils.prompt_file import read_prompts

DATA: Final = Path(__file__).parent / "data"
PROMPTS: Final = DATA / "prompts.txt"
TRIGGERS: Final = DATA / "triggers.json"


class DraftPrompt(NamedTuple):
    """A prompt, and the trigger that made it."""

    text: str
    trigger: str | None = None

    def request(self, **options: Any) -> PromptRequest:
        """Return a request for this prompt."""
        return PromptRequest(prompt=self.text, **options)


def trigger_prompts(path: Path = TRIGGERS) -> list[DraftPrompt]:
    """Return the prompts that the events of a file become, in order."""
    content = json.loads(path.read_text(encoding="utf-8"))
    triggers = {row["name"]: msgspec.convert(row, Trigger) for row in content["triggers"]}
    pairs = [(triggers[event["trigger"]], event["fields"]) for event in content["events"]]
    requests = [(trigger.name, make_prompt(trigger, fields)) for trigger, fields in pairs]
    return [DraftPrompt(made.prompt or "", name) for name, made in requests if made]


def file_prompts(path: Path, limit: int) -> list[DraftPrompt]:
    """Return `limit` prompts of a file, evenly spread over it."""
    return [DraftPrompt(text) for text in spread(read_prompts(path), limit)]


def spread(texts: Sequence[str], limit: int) -> list[str]:
    """Return at most `limit` texts, evenly spread."""
    count = min(limit, len(texts))
    return [texts[number * len(texts) // count] for number in range(count)]
