"""Distinct prompts for training, drawn from the model itself (Magpie, arXiv 2406.08464)."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from fleet.errors import ExportError
from onnx_export.tokenizer import start_ids
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
    """Token ids before and after the user's text. Prompts are drawn after `start`, until `end`.

    Without a chat template there is none after it: a prompt is the beginning of a text, and is
    drawn to any length.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    start: tuple[int, ...]
    end: int

    @classmethod
    def of(cls, tokenizer: Any) -> ChatFormat:
        """Split a chat template; raise ExportError if it changes the text or lacks a side."""
        if not tokenizer.chat_template:
            return cls._of_texts(tokenizer)
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
        return cls(tuple(before), tuple(after), start=tuple(before), end=after[0])

    @classmethod
    def _of_texts(cls, tokenizer: Any) -> ChatFormat:
        """Return the format of texts. Without a token that begins them they follow an end token.

        Raises:
            ExportError: there is no end token.
        """
        end = tokenizer.eos_token_id
        if end is None:
            raise ExportError(
                "the tokenizer has no chat template and no end token; expected one of them, "
                "set eos_token in its tokenizer_config.json"
            )
        before = tuple(start_ids(tokenizer))
        return cls(before, (), start=before or (end,), end=end)


def generate_prompts(
    model: Any, tokenizer: Any, chat: ChatFormat, count: int, generator: torch.Generator
) -> list[str]:
    """Let the model write `count` user turns, or beginnings of texts; return the prompts."""
    drawn = generate_texts(
        model,
        [chat.start] * count,
        ends=[chat.end],
        max_new_tokens=MAX_DRAWN_TOKENS,
        temperature=DRAW_TEMPERATURE,
        generator=generator,
    )
    complete = [ids for ids in drawn if not chat.after or len(ids) < MAX_DRAWN_TOKENS]
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
