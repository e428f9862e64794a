"""Distinct prompts for training, drawn from the model itself (Magpie, arXiv 2406.08464)."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from fleet.errors import ExportError
from onnx_export.training.generation import generate_texts

MARK: Final = "\N{REPLACEMENT CHARACTER}"
"""Placeholder of the user's text while the chat template is split."""
DRAW_TEMPERATURE: Final = 0.9
MAX_DRAWN_TOKENS: Final = 48
MIN_YIELD: Final = 0.01
MIN_WORDS: Final = 3
MIN_VARIETY: Final = 0.5  # distinct words per word


@dataclass(frozen=True)
class ChatFormat:
    """A chat template around the user's text, as token ids; `after` begins with its end token."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Any) -> ChatFormat:
        """Split a chat template; raise ExportError if it changes the text or lacks a side."""
        chat = [{"role": "user", "content": MARK}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        if text.count(MARK) != 1:
            raise ExportError(
                "the chat template does not hold the user's words as they are; cannot train on it"
            )
        before, after = (
            tokenizer(side, add_special_tokens=False)["input_ids"] for side in text.split(MARK)
        )
        if not before or not after:
            raise ExportError(
                "the chat template has nothing before or after the user's words; "
                "cannot draw prompts"
            )
        return cls(tuple(before), tuple(after))


def generate_prompts(
    model: Any, tokenizer: Any, chat: ChatFormat, count: int, generator: torch.Generator
) -> list[str]:
    """Let the model fill an empty user turn `count` times; return the texts that are prompts."""
    drawn = generate_texts(
        model,
        [chat.before] * count,
        ends=[chat.after[0]],
        max_new_tokens=MAX_DRAWN_TOKENS,
        temperature=DRAW_TEMPERATURE,
        generator=generator,
    )
    complete = [ids for ids in drawn if len(ids) < MAX_DRAWN_TOKENS]
    texts = [tokenizer.decode(ids).strip() for ids in complete]
    return [text for text in texts if is_prompt(text)]


def draw_many(
    model: Any, tokenizer: Any, count: int, seed: int, batch: int, progress: Callable[[int], None]
) -> list[str]:
    """Return `count` different prompts; `progress` receives the number so far.

    It draws `batch` texts at once, or twice `count` if that is less: not every text is a prompt.

    Raises:
        ExportError: the model hardly puts a prompt into an empty user turn.
    """
    chat = ChatFormat.of(tokenizer)
    size = min(batch, 2 * count)
    generator = torch.Generator().manual_seed(seed)
    drawn: list[str] = []
    for num_batches in itertools.count(1):
        drawn += generate_prompts(model, tokenizer, chat, size, generator)
        drawn = without_repeats(drawn)
        progress(min(count, len(drawn)))
        if len(drawn) >= count:
            return drawn[:count]
        check_yield(num_batches * size, len(drawn))
    raise AssertionError


def check_yield(num_texts: int, num_prompts: int) -> None:
    """Raise ExportError when hardly any drawn text is a prompt."""
    if num_texts > 1000 and num_prompts < MIN_YIELD * num_texts:
        raise ExportError(
            f"{num_prompts} of {num_texts} texts that the model put into an empty user turn are "
            "prompts; is it a chat model? Give prompts in files"
        )


def is_prompt(text: str) -> bool:
    """Return whether a text has enough words and does not repeat itself."""
    words = re.findall(r"\w+", text.lower())
    num_distinct = len(set(words))
    return len(words) >= MIN_WORDS and num_distinct >= MIN_VARIETY * len(words)


def without_repeats(prompts: Sequence[str]) -> list[str]:
    """Return the first of each prompt in order, ignoring case, punctuation and spaces."""
    first: dict[str, str] = {}
    for prompt in prompts:
        words = re.findall(r"\w+", prompt.lower())
        first.setdefault(" ".join(words), prompt)
    return list(first.values())
