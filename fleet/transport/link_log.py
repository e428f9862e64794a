"""The log of one link: a line for each loss and each return, and the reason while it is down."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final

MIN_INTERVAL_S: Final = 60.0
"""Minimum time between two losses that are logged as warnings."""

MANY_LOSSES: Final = 5  # between two losses that are logged as warnings
HINT: Final = "; it lost the link {} times in the last minutes; two processes may use its name"


class LinkLog:
    """The log lines about the link of `name` to the broker at `address`; for one thread.

    `is_unattended` means that no caller waits for the first outcome, so the log has to report it.
    """

    def __init__(
        self,
        logger: logging.Logger,
        name: str,
        address: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.is_unattended = False
        self._logger = logger
        self._link = (name, address)
        self._clock = clock
        self._was_up = False
        self._failure = ""  # the last one since the link was up
        self._reported: set[str] = set()  # failures that were logged as warnings since then
        self._num_losses = 0  # since the last one that was logged as a warning
        self._next_loss_at = float("-inf")
        self._loss_level = logging.INFO

    def lost(self, reason: object) -> None:
        """Log a loss: as a warning, unless another one was less than `MIN_INTERVAL_S` ago."""
        now = self._clock()
        self._num_losses += 1
        is_warning = now >= self._next_loss_at
        self._loss_level = logging.WARNING if is_warning else logging.INFO
        hint = HINT.format(self._num_losses) if self._num_losses > MANY_LOSSES else ""
        text = "%s lost its link to the broker at %s (%s); connecting again%s"
        self._logger.log(self._loss_level, text, *self._link, reason, hint)
        if is_warning:
            self._next_loss_at = now + MIN_INTERVAL_S
            self._num_losses = 0

    def connected(self) -> None:
        """Log that the link is up, at the level of its loss or of the previous failure."""
        level = logging.WARNING if self._reported else self._loss_level
        self._logger.log(level, "%s is connected to the broker at %s", *self._link)
        self.is_unattended = True
        self._was_up = True
        self._failure = ""
        self._reported.clear()
        self._loss_level = logging.INFO

    def failed(self, failure: str, *, needs_help: bool) -> None:
        """Log why an attempt to connect failed, each reason once.

        The line is a warning if the link was never up. After a loss it is a warning only if the
        failure needs help and the previous attempt failed for the same reason.
        """
        is_repeated = failure == self._failure
        is_warning = self.is_unattended and (not self._was_up or (needs_help and is_repeated))
        text = "no connection of %s to the broker at %s: %s"
        if is_warning and failure not in self._reported:
            self._reported.add(failure)
            self._logger.warning(f"{text}; trying again", *self._link, failure)
        elif not is_repeated:
            self._logger.info(text, *self._link, failure)
        self._failure = failure
