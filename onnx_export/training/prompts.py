"""Prompts to train on: drawn from the model itself (Magpie, arXiv 2406.08464), and each only once."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from fleet.errors import ExportError
from onnx_export.training.generation import complete

MARK: Final = "\N{REPLACEMENT CHARACTER}"  # stands for the user's words while the chat template is taken apart
DRAW_TEMPERATURE: Final = 0.9
LONGEST_DRAWN: Final = 48  # tokens
MIN_YIELD: Final = 0.01
FEWEST_WORDS: Final = 3
LEAST_VARIETY: Final = 0.5  # distinct words per word


@dataclass(frozen=True)
class ChatFormat:
    """A chat template around the user's words, as token ids, and the token that ends them."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Any) -> ChatFormat:
        """Raises ExportError when the template changes the user's words."""
        chat = [{"role": "user", "content": MARK}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        if text.count(MARK) != 1:
            raise ExportError(
                "the chat template does not hold the user's words as they are; cannot train on it"
            )
        before, after = (
            tokenizer(part, add_special_tokens=False)["input_ids"] for part in text.split(MARK)
        )
        if not before or not after:
            raise ExportError(
                "the chat template has nothing before or after the user's words; cannot draw prompts"
            )
        return cls(tuple(before), tuple(after))


def draw_prompts(
    model: Any, tokenizer: Any, chat: ChatFormat, count: int, generator: torch.Generator
) -> list[str]:
    """What the model puts into an empty user turn, `count` times, without what is no prompt."""
    drawn = complete(
        model,
        [chat.before] * count,
        ends=[chat.after[0]],
        max_new_tokens=LONGEST_DRAWN,
        temperature=DRAW_TEMPERATURE,
        generator=generator,
    )
    texts = (
        tokenizer.decode(ids).strip() for ids in drawn if len(ids) < LONGEST_DRAWN
    )  # else it was cut off
    return [text for text in texts if is_prompt(text)]


def draw_many(
    model: Any, tokenizer: Any, count: int, seed: int, batch: int, progress: Callable[[int], None]
) -> list[str]:
    """`count` different prompts; `progress` hears how many there are.

    Raises:
        ExportError: the model hardly puts a prompt into an empty user turn.
    """
    chat = ChatFormat.of(tokenizer)
    generator = torch.Generator().manual_seed(seed)
    drawn: list[str] = []
    for tries in itertools.count(1):
        drawn = without_repeats(drawn + draw_prompts(model, tokenizer, chat, batch, generator))
        progress(min(count, len(drawn)))
        if len(drawn) >= count:
            return drawn[:count]
        check_yield(tries * batch, len(drawn))
    raise AssertionError


def check_yield(tried: int, drawn: int) -> None:
    """Raises ExportError when next to nothing that was drawn is a prompt."""
    if tried > 1000 and drawn < MIN_YIELD * tried:
        raise ExportError(
            f"{drawn} of {tried} texts that the model put into an empty user turn are prompts; is it a chat model? "
            "Give prompts in files"
        )


def is_prompt(text: str) -> bool:
    """Whether a text has some words and does not go round in circles."""
    words = re.findall(r"\w+", text.lower())
    return len(words) >= FEWEST_WORDS and len(set(words)) >= LEAST_VARIETY * len(words)


def without_repeats(prompts: Sequence[str]) -> list[str]:
    """The prompts in order, each once, whatever its case, punctuation and spaces."""
    first: dict[str, str] = {}
    for prompt in prompts:
        first.setdefault(" ".join(re.findall(r"\w+", prompt.lower())), prompt)
    return list(first.values())
