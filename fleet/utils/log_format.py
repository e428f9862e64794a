"""The format of log lines: for the journal, or with time and level for files and terminals."""

from __future__ import annotations

import logging
import os
import sys
from typing import IO, Final

TEXT: Final = "%(name)s: %(message)s"
PRIORITIES: Final = {
    logging.CRITICAL: 2,
    logging.ERROR: 3,
    logging.WARNING: 4,
    logging.INFO: 6,
    logging.DEBUG: 7,
}
"""syslog's priorities, sd-daemon(3)."""


class JournalFormatter(logging.Formatter):
    """The priority before each line; the journal adds the time by itself."""

    def format(self, record: logging.LogRecord) -> str:
        prefix = f"<{PRIORITIES.get(record.levelno, 6)}>"
        lines = super().format(record).splitlines()
        return "\n".join(f"{prefix}{line}" for line in lines)


def set_up_log(level: int = logging.WARNING) -> None:
    """Log to stderr, in the format that its reader needs."""
    handler = logging.StreamHandler()
    handler.setFormatter(log_formatter(sys.stderr))
    logging.basicConfig(level=level, handlers=[handler])


def log_formatter(stream: IO[str]) -> logging.Formatter:
    """Return the formatter for a stream; its times are the machine's local time."""
    if _is_journal(stream):
        return JournalFormatter(TEXT)
    return logging.Formatter(f"%(asctime)s %(levelname)s {TEXT}")


def _is_journal(stream: IO[str]) -> bool:
    """Whether the stream leads to the journal, whose device and inode ``JOURNAL_STREAM`` holds."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
