"""The format of log lines: for the journal, or with time and level for files and terminals."""

from __future__ import annotations

import logging
import os
import sys
import time
import traceback
from typing import IO, Final

from fleet.utils.printable import printable_line

TEXT: Final = "%(name)s: %(message)s"
PRIORITIES: Final = {
    logging.CRITICAL: 2,
    logging.ERROR: 3,
    logging.WARNING: 4,
    logging.INFO: 6,
    logging.DEBUG: 7,
}
"""syslog's priorities, sd-daemon(3)."""

REPEATED_S: Final = 60.0


class RepeatedErrors(logging.Filter):
    """Show each unexpected error with its traceback once; later as one line in `interval_s` s.

    A task that runs each second, or a client that finds the error, cannot fill the log.
    """

    def __init__(self, interval_s: float = REPEATED_S) -> None:
        super().__init__()
        self._interval_s = interval_s
        self._next_at: dict[tuple[str, int], float] = {}  # by place in the code, so bounded

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to show the record; remove its traceback if that has been shown."""
        error = record.exc_info and record.exc_info[1]
        if not error:
            return True
        frame = traceback.extract_tb(error.__traceback__)[-1:]
        place = (frame[0].filename, frame[0].lineno or 0) if frame else (record.name, 0)
        is_repeated = place in self._next_at
        now = time.monotonic()
        if now < self._next_at.get(place, now):
            return False
        self._next_at[place] = now + self._interval_s
        if is_repeated:
            record.msg = f"{record.getMessage()}: {type(error).__name__}: {error}"
            record.args = ()
            record.exc_info = None
            record.exc_text = None
        return True


class LineFormatter(logging.Formatter):
    """One line for each message: a name or a path in it may have line breaks."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (of the base class)
        return printable_line(super().formatMessage(record))


class JournalFormatter(LineFormatter):
    """The priority before each line; the journal adds the time by itself."""

    def format(self, record: logging.LogRecord) -> str:
        prefix = f"<{PRIORITIES.get(record.levelno, 6)}>"
        lines = super().format(record).splitlines()
        return "\n".join(f"{prefix}{line}" for line in lines)


def set_up_log(level: int = logging.WARNING) -> None:
    """Log to stderr, in the format that its reader needs."""
    handler = logging.StreamHandler()
    handler.setFormatter(log_formatter(sys.stderr))
    handler.addFilter(RepeatedErrors())
    logging.basicConfig(level=level, handlers=[handler])


def log_formatter(stream: IO[str]) -> logging.Formatter:
    """Return the formatter for a stream; its times are the machine's local time."""
    if _is_journal(stream):
        return JournalFormatter(TEXT)
    return LineFormatter(f"%(asctime)s %(levelname)s {TEXT}")


def _is_journal(stream: IO[str]) -> bool:
    """Whether the stream leads to the journal, whose device and inode ``JOURNAL_STREAM`` holds."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
