"""A log that a flood of invalid messages cannot fill."""

from __future__ import annotations

import logging
import time


class RateLimitedLog:
    """A log with at most one warning in `interval_s` seconds, which counts those left out."""

    def __init__(self, log: logging.Logger, interval_s: float = 1.0) -> None:
        self._log = log
        self._interval_s = interval_s
        self._next_at = float("-inf")
        self._num_left_out = 0

    def warning(self, message: str, *values: object) -> None:
        """Write one line, formatted as :mod:`logging` does, or none."""
        now = time.monotonic()
        if now < self._next_at:
            self._num_left_out += 1
            return
        if self._num_left_out:
            message += f" ({self._num_left_out} more such lines were left out)"
        self._log.warning(message, *values)
        self._next_at = now + self._interval_s
        self._num_left_out = 0
