"""Text that arrives in pieces, wrapped between words at the width of the terminal."""

from __future__ import annotations

import re
from typing import Final

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

TAB_STOP: Final = 8
RUN: Final = re.compile(r"\s|\S+")


class WordWrap:
    """Print text while it arrives. In a terminal a word is held back until it is complete.

    Into a pipe or a file, the text is written as it is.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._has_text = False
        self._column = 0
        self._word = Text()
        self._line = Text()  # complete, and not printed yet

    def print(self, text: str, style: str = "") -> None:
        """Print the next piece."""
        if not self._console.is_terminal:
            self._write(Text(text, style))
            return
        for run in RUN.findall(text):
            self._add(run, style)
        self._write(self._line)
        self._line = Text()

    def end(self) -> None:
        """Print what is left, and end the line if there was any text."""
        self._place_word()
        self._write(self._line)
        if self._has_text:
            self._console.print()

    def _add(self, run: str, style: str) -> None:
        if run == "\n":
            self._place_word()
            self._new_line()
        elif run.isspace():
            self._place_word()
            self._place_space(run)
        elif cell_len(run) == len(run):
            self._add_letters(run, style)
        else:
            for character in run:
                self._add_letters(character, style)
                if cell_len(character) > 1:  # of a script that wraps without spaces
                    self._place_word()

    def _add_letters(self, letters: str, style: str) -> None:
        self._word.append(letters, style)
        if self._word.cell_len >= self._console.width:
            self._place_word()

    def _place_word(self) -> None:
        if self._column + self._word.cell_len > self._console.width:
            self._new_line()
        self._line.append_text(self._word)
        self._column += self._word.cell_len
        self._word = Text()

    def _place_space(self, character: str) -> None:
        spaces = " " * (TAB_STOP - self._column % TAB_STOP if character == "\t" else 1)
        if self._column + len(spaces) >= self._console.width:
            self._new_line()
            return
        self._line.append(spaces)
        self._column += len(spaces)

    def _new_line(self) -> None:
        self._line.append("\n")
        self._column = 0

    def _write(self, text: Text) -> None:
        if text:
            self._has_text = True
            self._console.print(text, end="", soft_wrap=True)
