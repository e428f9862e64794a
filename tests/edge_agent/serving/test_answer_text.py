"""The text of a response ends before its first stop text, whatever the borders of the tokens."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer

from edge_agent.engine.tokenizer import TextStream
from edge_agent.serving.answer_text import AnswerText
from tests.edge_agent.engine.test_tokenizer import byte_fallback_tokenizer
from tests.tiny import make_tiny_tokenizer

SPECIAL = frozenset((0, 1, 2))
STOPS = (
    ("END",),
    ("abab", "ba"),
    ("aab",),
    ("ab", "b"),
    ("a\nb", "\n\n"),
    (" a",),
    ("\u2603", "aaaa"),
    ("<|im_end|>",),
)


def cut(text: str, stops: tuple[str, ...]) -> str:
    """Return `text` before the stop text that is complete first."""
    for end in range(len(text) + 1):
        begins = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if begins:
            return text[: min(begins)]
    return text


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tiny_tokenizer().backend_tokenizer


def tokens_of(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def answer(
    tokenizer: Tokenizer, ids: list[int], stops: tuple[str, ...]
) -> tuple[list[str], AnswerText]:
    """Return the pieces of the tokens up to a stop text, and the text."""
    text = AnswerText(TextStream(tokenizer, SPECIAL), stops)
    pieces = []
    for token_id in ids:
        pieces.append(text.push(token_id))
        if text.is_stopped:
            break
    return [*pieces, text.flush()], text


@pytest.mark.parametrize("stops", STOPS, ids=str)
@pytest.mark.parametrize("tokenizer", [make_tiny_tokenizer().backend_tokenizer], ids=["bytes"])
def test_the_text_is_cut_before_the_stop_text_that_is_complete_first(
    tokenizer: Tokenizer, stops: tuple[str, ...]
) -> None:
    source = random.Random(0)
    num_cut = 0
    for _ in range(300):
        written = "".join(source.choices(["a", "b", "a", "\n", " ", "END", "E", "\u2603"], k=12))
        pieces, text = answer(tokenizer, tokens_of(tokenizer, written), stops)
        expected = cut(written, stops)
        assert "".join(pieces) == text.text == expected
        assert text.is_stopped == (expected != written)
        num_cut += text.is_stopped
    assert num_cut > 3 or stops == ("<|im_end|>",)


def test_text_that_began_a_stop_text_comes_when_it_is_none(tokenizer: Tokenizer) -> None:
    ids = tokens_of(tokenizer, "aENDaEN")
    pieces, text = answer(tokenizer, ids, ("ENDE",))
    assert pieces == ["a", "", "", "", "ENDa", "", "", "EN"]
    assert not text.is_stopped


def test_nothing_of_a_stop_text_is_sent(tokenizer: Tokenizer) -> None:
    pieces, text = answer(tokenizer, tokens_of(tokenizer, "one END two"), ("END",))
    assert pieces == ["o", "n", "e", " ", "", "", "", ""]
    assert text.is_stopped


def test_a_stop_text_of_one_character_of_several_tokens(tokenizer: Tokenizer) -> None:
    ids = tokens_of(tokenizer, "a\u2603b")
    assert len(ids) == 5
    pieces, text = answer(tokenizer, ids, ("\u2603",))
    assert (pieces, text.is_stopped) == (["a", "", "", "", ""], True)


def test_bytes_that_become_a_stop_text_only_at_the_end_are_cut() -> None:
    tokenizer = byte_fallback_tokenizer()
    newline = tokenizer.token_to_id("<0x0A>")
    pieces, text = answer(tokenizer, [tokenizer.token_to_id("b"), newline], ("\n",))
    assert (pieces, text.text, text.is_stopped) == (["b", "", ""], "b", True)


def test_the_name_of_a_control_token_is_no_text(tokenizer: Tokenizer) -> None:
    end = tokenizer.token_to_id("<|im_end|>")
    ids = [*tokens_of(tokenizer, "a"), end, *tokens_of(tokenizer, "b")]
    pieces, text = answer(tokenizer, ids, ("<|im_end|>", "ab"))
    assert (pieces, text.text, text.is_stopped) == (["", "", "", ""], "", True)
