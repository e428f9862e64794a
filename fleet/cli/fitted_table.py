"""Tables that become lists, one field a line, in a terminal that is too narrow for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from fleet.utils.console import outside_text

MAX_COLUMNS: Final = 10_000  # of a table before it is fitted to the terminal
FOLDED_COLUMNS: Final = 80
"""Enough for every table whose long words may be folded."""


class FittedTable(Table):
    """A table, or a list of its rows where its longest words do not fit side by side.

    A text of a cell is shown as it is, and never controls the terminal.
    """

    def add_row(self, *cells: RenderableType | None, **options: Any) -> None:
        """Add a row, as a table of rich does."""
        shown = (outside_text(cell) if isinstance(cell, str) else cell for cell in cells)
        super().add_row(*shown, **options)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self._needed_columns(console) <= options.max_width:
            for column in self.columns:
                column.overflow = "fold"  # rich may make a column narrower than its longest word
            yield from super().__rich_console__(console, options)
        else:
            yield from self._lists()

    def _needed_columns(self, console: Console) -> int:
        unlimited = console.options.update_width(MAX_COLUMNS)
        needed = Measurement.get(console, unlimited, self).minimum
        can_fold = any(column.overflow == "fold" for column in self.columns)
        return min(needed, FOLDED_COLUMNS) if can_fold else needed

    def _lists(self) -> Iterator[RenderableType]:
        """The cells of each row one below another, each row after an empty line."""
        if self.title:
            yield self.title
        columns = [(str(column.header), list(column.cells)) for column in self.columns]
        for i in range(self.row_count):
            grid = Table.grid(padding=(0, 2))
            grid.add_column(overflow="fold")
            grid.add_column(overflow="fold")
            for header, cells in columns:
                grid.add_row(header, cells[i])
            yield Text()
            yield grid
