"""The terminal: consoles that print text as it is, and text from outside as a cell or a line."""

from __future__ import annotations

from typing import IO, Final

from rich.console import Console
from rich.text import Text

from fleet.utils.printable import printable

MIN_COLUMNS: Final = 20  # a narrower terminal breaks the lines by itself


def new_console(
    *,
    stderr: bool = False,
    file: IO[str] | None = None,
    width: int | None = None,
    is_terminal: bool | None = None,
) -> Console:
    """Make a console without markup, emoji codes and highlighting; a `file` is recorded.

    `is_terminal` None looks at the file.
    """
    console = Console(
        stderr=stderr,
        file=file,
        width=width,
        force_terminal=is_terminal,
        record=file is not None,
        markup=False,
        emoji=False,
        highlight=False,
    )
    if width is None and console.width < MIN_COLUMNS:
        console.width = MIN_COLUMNS
    return console


def outside_text(text: str, style: str = "") -> Text:
    """Return text of users, devices or models as a cell or a line; it never controls a terminal."""
    return Text(printable(text), style)
