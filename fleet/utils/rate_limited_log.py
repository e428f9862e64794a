"""A log that a flood of invalid messages cannot fill."""

from __future__ import annotations

import logging
import time
from typing import Final

from fleet.utils.printable import printable

MAX_REASON_LENGTH: Final = 300


class RateLimitedLog:
    """A log with at most `max_lines` warnings in `interval_s` seconds, which counts those left
    out.
    """

    def __init__(self, log: logging.Logger, interval_s: float = 1.0, max_lines: int = 1) -> None:
        self._log = log
        self._interval_s = interval_s
        self._max_lines = max_lines
        self._next_at = float("-inf")  # the end of the interval
        self._num_lines = 0
        self._num_left_out = 0

    def warning(self, message: str, *values: object) -> None:
        """Write one line, formatted as :mod:`logging` does, or none.

        An exception's text may quote what came over the wire: it is cut, and put on one line.
        """
        now = time.monotonic()
        if now >= self._next_at:
            self._next_at = now + self._interval_s
            self._num_lines = 0
        if self._num_lines >= self._max_lines:
            self._num_left_out += 1
            return
        if self._num_left_out:
            message += f" ({self._num_left_out} more such lines were left out)"
        self._log.warning(message, *map(_line_of, values))
        self._num_lines += 1
        self._num_left_out = 0


def _line_of(value: object) -> object:
    if not isinstance(value, Exception):
        return value
    return printable(" ".join(str(value).split()))[:MAX_REASON_LENGTH]
