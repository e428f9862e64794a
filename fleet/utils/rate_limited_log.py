"""A log that a flood of bad messages cannot fill."""

from __future__ import annotations

import logging
import time


class RateLimitedLog:
    """Writes at most one warning in `interval_s` seconds; the next one says how many were left out."""

    def __init__(self, log: logging.Logger, interval_s: float = 1.0) -> None:
        self._log = log
        self._interval_s = interval_s
        self._next_at = float("-inf")
        self._num_left_out = 0

    def warning(self, message: str, *values: object) -> None:
        """One line, formatted as :mod:`logging` does, or none."""
        now = time.monotonic()
        if now < self._next_at:
            self._num_left_out += 1
            return
        note = (
            f" ({self._num_left_out} more such lines were left out)" if self._num_left_out else ""
        )
        self._log.warning(message + note, *values)
        self._next_at = now + self._interval_s
        self._num_left_out = 0
