"""Text streams out in whole characters."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from edge_agent.engine.tokenizer import ChatTokenizer
from fleet.bundles.manifest import Bundle
from fleet.protocol.prompt import ChatMessage
from tests.tiny import make_tiny_tokenizer


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


def test_templates_may_use_what_transformers_gives_them(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    template = (
        "{{ strftime_now('today') }} {% for message in messages %}"
        "{% if message.role == 'system' %}{% continue %}{% endif %}"
        "{% if message.role == 'assistant' %}"
        "{% generation %}<{{ message.content }}>{% endgeneration %}"
        "{% else %}{{ message.content }}{% endif %}{% endfor %}"
    )
    shutil.copytree(tiny_bundle.folder / "tokenizer", tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(template)
    tokenizer = ChatTokenizer(Bundle(tmp_path, tiny_bundle.manifest))
    turns = [ChatMessage("system", "no"), ChatMessage("user", "a"), ChatMessage("assistant", "b")]
    given = [{"role": turn.role, "content": turn.content} for turn in turns]
    assert tokenizer.encode_chat(turns) == make_tiny_tokenizer().apply_chat_template(
        given, chat_template=template
    )
