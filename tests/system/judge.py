"""Holds answers against the whole model's: every token, and every count."""

from __future__ import annotations

import threading
from collections import Counter
from functools import cache
from pathlib import Path
from typing import TypeAlias

import msgspec
from tokenizers import pre_tokenizers

from benchmarks.whole_model import WholeModel
from fleet.bundles.manifest import Bundle
from fleet.protocol.messages import NO_RULES, ChoiceRules
from fleet.protocol.modes import CLOUD, FALLBACK, Mode
from fleet.protocol.prompt import ChatMessage, PromptRequest
from tests.system.memory_fleet import Answer
from tests.tiny import SPECIAL_TOKENS

Prompt: TypeAlias = str | tuple[ChatMessage, ...]
_LOCK = threading.Lock()  # some scenarios run side by side
DRAFT_THRESHOLD = 0.05  # low for the tiny model: its exits draft, and are wrong most of the time


FEW_TOKENS = 12
LETTERS = {
    str(len(SPECIAL_TOKENS) + index): 100.0
    for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    if character.isascii() and character.islower()
}
"""A bias to the tokens of letters: a text of them has these tokens again in the next turn."""


def request(
    prompt: str, mode: Mode = Mode.VERIFIED, num_tokens: int = 24, **changes: object
) -> PromptRequest:
    """One whose every token can be judged: verified, or with all exits off."""
    threshold = DRAFT_THRESHOLD if mode is Mode.VERIFIED else 1.0
    values = {
        "prompt": prompt,
        "mode": mode,
        "threshold": threshold,
        "max_new_tokens": num_tokens,
    } | changes
    return PromptRequest(**values)  # type: ignore[arg-type]


def first_turn(question: str, mode: Mode = Mode.VERIFIED) -> PromptRequest:
    """The short first turn of a conversation."""
    messages = (ChatMessage("user", question),)
    alone = request(question, mode, FEW_TOKENS, logit_bias=LETTERS)
    return msgspec.structs.replace(alone, prompt=None, messages=messages)


def next_turn(
    asked: PromptRequest, answer: Answer, question: str, num_tokens: int = FEW_TOKENS
) -> PromptRequest:
    """The turn after an answer."""
    assert asked.messages is not None
    said = ChatMessage("assistant", answer.text), ChatMessage("user", question)
    return msgspec.structs.replace(
        asked, messages=(*asked.messages, *said), max_new_tokens=num_tokens
    )


def judge(bundle: Bundle, asked: PromptRequest, answer: Answer) -> None:
    """Fails unless the answer is whole and right, and its counts are those of its tokens.

    In verified mode all tokens are the whole model's; otherwise those from the cloud are.
    """
    prompt = asked.prompt or asked.messages
    assert prompt is not None
    assert asked.max_new_tokens is not None
    assert [reply.seq for reply in answer.replies] == list(range(len(answer.replies)))
    assert answer.last.done
    sources = Counter(reply.source for reply in answer.replies if reply.token_id is not None)
    assert answer.sources == sources
    assert answer.last.usage is not None
    assert answer.last.usage.tokens == len(answer.token_ids) == sources.total()
    rules = asked.choice_rules(answer.last.usage.prompt_tokens)
    if asked.mode is Mode.VERIFIED:
        assert answer.token_ids == expected_tokens(
            bundle.folder, prompt, asked.max_new_tokens, rules
        )
        assert FALLBACK not in sources
        return
    assert len(answer.token_ids) == asked.max_new_tokens or answer.last.finish_reason == "stop"
    with _LOCK:
        differences = _whole(bundle.folder).differences(prompt, answer.token_ids, rules)
    not_whole = {difference.number for difference in differences}
    from_cloud = {i for i, reply in enumerate(answer.replies) if reply.source == CLOUD}
    assert not not_whole & from_cloud


def expected_tokens(
    folder: Path, prompt: Prompt, num_tokens: int, rules: ChoiceRules = NO_RULES
) -> list[int]:
    """The whole model's greedy answer."""
    with _LOCK:
        return _generated(folder, prompt, num_tokens, rules)


@cache
def _generated(folder: Path, prompt: Prompt, num_tokens: int, rules: ChoiceRules) -> list[int]:
    return _whole(folder).generate(prompt, num_tokens, rules=rules)


@cache
def _whole(folder: Path) -> WholeModel:
    return WholeModel(Bundle.load(folder), num_threads=1)
