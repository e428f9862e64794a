"""Answers in a terminal break between words, and stay as they are in a pipe."""

from __future__ import annotations

import io

from fleet.cli.word_wrap import WordWrap
from fleet.utils.console import new_console


def shown(*pieces: str, is_terminal: bool = True) -> str:
    out = io.StringIO()
    console = new_console(file=out, width=12, is_terminal=is_terminal)
    wrap = WordWrap(console)
    for piece in pieces:
        wrap.print(piece)
    wrap.end()
    return out.getvalue()


def test_a_word_is_never_cut_though_its_pieces_arrive_one_by_one() -> None:
    assert shown("The cap", "ital", " of Fra", "nce", " is", " Paris.") == (
        "The capital\nof France is\nParis.\n"
    )


def test_only_a_word_longer_than_the_line_is_cut() -> None:
    text = shown("see ", "https://", "example.org/a", " now")
    assert "".join(text.split()) == "seehttps://example.org/anow"
    assert max(map(len, text.split())) > 12


def test_scripts_without_spaces_wrap_at_the_edge() -> None:
    assert shown("東京は日本", "の首都です") == "東京は日本の\n首都です\n"


def test_a_lists_lines_and_indents_are_kept() -> None:
    assert shown("- one\n", "  - two\n\n", "\tx") == "- one\n  - two\n\n        x\n"


def test_a_pipe_gets_the_text_as_it_is() -> None:
    text = "The capital of France is Paris."
    assert shown(text, is_terminal=False) == text + "\n"


def test_an_answer_without_text_prints_nothing() -> None:
    assert shown() == ""
