"""Text streams out in whole characters."""

from __future__ import annotations

import pytest

from edge_agent.tokenizer import ChatTokenizer
from fleet.manifest import Bundle
from fleet.prompt import ChatMessage


@pytest.fixture(scope="module")
def tokenizer(tiny_bundle: Bundle) -> ChatTokenizer:
    return ChatTokenizer(tiny_bundle)


def test_a_character_of_several_tokens_comes_out_whole(tokenizer: ChatTokenizer) -> None:
    text = "snow ☃ and émigré 🦜"
    ids = tokenizer._tokenizer.encode(text, add_special_tokens=False).ids
    stream = tokenizer.stream()
    pieces = [stream.push(token_id) for token_id in ids]
    assert "".join(pieces) + stream.flush() == text
    assert len(ids) > len(text)
    assert not any("\ufffd" in piece for piece in pieces)


def test_half_a_character_at_the_end_is_never_emitted(tokenizer: ChatTokenizer) -> None:
    ids = tokenizer._tokenizer.encode("a🦜", add_special_tokens=False).ids
    stream = tokenizer.stream()
    text = "".join(stream.push(token_id) for token_id in ids[:-1]) + stream.flush()
    assert text == "a"


def test_the_chat_template_ends_with_the_assistants_turn(tokenizer: ChatTokenizer) -> None:
    one = tokenizer.encode_chat([ChatMessage("user", "hello")])
    two = tokenizer.encode_chat(
        [ChatMessage("user", "hello"), ChatMessage("assistant", "hi"), ChatMessage("user", "x")]
    )
    assert 0 < len(one) < len(two)
