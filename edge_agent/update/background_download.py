"""The download of a bundle or of a version in the background, while another one is served."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeAlias

from fleet.errors import FleetError, ServiceAwayError
from fleet.protocol.report import ConfigProblem
from fleet.protocol.types import MAX_LABEL_LENGTH
from fleet.utils.backoff import backoff_s

RETRY_FACTOR: Final = 15  # of the usual back-off: at most two minutes
STOP_S: Final = 5.0

Fetch: TypeAlias = Callable[[str, threading.Event], Path]
"""Downloads by name until it is complete or the event is set; returns its folder."""

log = logging.getLogger(__name__)


class BackgroundDownload:
    """Downloads one name at a time by `fetch`, which is called again after a ServiceAwayError.

    On a thread of its own it calls `on_done` with the name and its folder, and `on_error` with
    the name and the problem; one that is not final lasts until the next attempt. `kind` is what
    the names are, for messages.
    """

    def __init__(
        self,
        fetch: Fetch,
        on_done: Callable[[str, Path], None],
        on_error: Callable[[str, ConfigProblem], None],
        *,
        kind: str = "bundle",
    ) -> None:
        self.name: str | None = None
        self._kind = kind
        self._fetch = fetch
        self._on_done = on_done
        self._on_error = on_error
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, name: str) -> None:
        """Download `name`, and cancel the download of another one."""
        if self.name == name and self._thread and self._thread.is_alive():
            return
        self.cancel()
        self.name = name
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(name, self._stop), name=f"fetch-{name[:8]}", daemon=True
        )
        self._thread.start()

    def cancel(self) -> None:
        """End the download, within `STOP_S` seconds; its files so far stay on disk."""
        self._stop.set()
        if self._thread:
            self._thread.join(STOP_S)
        self._thread = None
        self.name = None

    def _run(self, name: str, stop: threading.Event) -> None:
        num_failures = 0
        while not stop.is_set():
            try:
                folder = self._fetch(name, stop)
            except ServiceAwayError as error:
                if stop.is_set():
                    return
                log.info("%s %s: %s", self._kind, name, error)
                self._on_error(name, _temporary_problem(error))
                pause_s = RETRY_FACTOR * backoff_s(num_failures, random.random())
                stop.wait(max(pause_s, error.retry_after_s))
                num_failures += 1
            except FleetError as error:
                self._on_error(name, self._final_problem(name, error.code, str(error)))
                return
            except Exception as error:  # the outermost boundary of a thread
                log.exception("%s %s cannot be downloaded", self._kind, name)
                reason = f"it cannot be downloaded: {error}"
                self._on_error(name, self._final_problem(name, FleetError.code, reason))
                return
            else:
                self._on_done(name, folder)
                return

    def _final_problem(self, name: str, code: str, reason: str) -> ConfigProblem:
        message = f"{self._kind} {name}: {reason}"
        return ConfigProblem(code, message[:MAX_LABEL_LENGTH], is_final=True)


def _temporary_problem(error: ServiceAwayError) -> ConfigProblem:
    message = f"{error}; the device tries again"
    return ConfigProblem(error.code, message[:MAX_LABEL_LENGTH], is_final=False)
