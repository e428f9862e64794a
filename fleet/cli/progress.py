"""Progress of long work on stderr: bars in a terminal, lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from fleet.utils.console import new_console

LINE_S: Final = 10.0
"""The least time between two lines of a stage."""

Report = Callable[[str, int, int], None]
"""Receives a stage with its done and total work; with a total of 0 the stage is a message."""


@contextmanager
def stage_progress() -> Iterator[Report]:
    """Show the progress of stages; the function that receives it."""
    console = new_console(stderr=True)
    if not console.is_terminal:
        yield StageLines(console).report
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:
        yield StageBars(bars).report


@contextmanager
def progress_bar(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show the progress of one stage; the function that receives the number of completed items."""
    with stage_progress() as report:
        report(description, 0, total)
        yield lambda done: report(description, done, total)


class StageBars:
    """A bar for each stage."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def report(self, stage: str, done: int, total: int) -> None:
        """Move the bar of a stage, or print a message."""
        if total == 0:
            self._bars.console.print(stage, markup=False, highlight=False)
            return
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total)
        self._bars.update(self._tasks[stage], completed=min(done, total))


class StageLines:
    """Lines for each stage: its begin, its end, and one now and then."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lines: dict[str, tuple[str, float]] = {}

    def report(self, stage: str, done: int, total: int) -> None:
        """Print a line if the stage begins or ends, or the last line is old; or a message."""
        line = f"{stage}: {min(done, total)} of {total}" if total else stage
        last_line, last_time = self._lines.get(stage, ("", -LINE_S))
        now = time.monotonic()
        is_due = done >= total or now - last_time >= LINE_S
        if line != last_line and is_due:
            self._lines[stage] = (line, now)
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)
