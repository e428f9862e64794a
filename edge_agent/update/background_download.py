"""A bundle fetched in the background, as long as it takes, while another one is served."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from fleet.errors import FleetError, ServiceAwayError
from fleet.protocol.report import NOT_YET
from fleet.utils.backoff import backoff_s

RETRY_FACTOR: Final = 15  # of the usual back-off: at most two minutes
STOP_S: Final = 5.0

log = logging.getLogger(__name__)


class BackgroundDownload:
    """Fetches one bundle at a time by `fetch`, which is asked again while it raises ServiceAwayError.

    On a thread of its own `on_done` is told the bundle and its folder, and `on_error` the bundle and what is in the
    way: for good or, where that begins with `NOT_YET`, until the next try.
    """

    def __init__(
        self,
        fetch: Callable[[str, threading.Event], Path],
        on_done: Callable[[str, Path], None],
        on_error: Callable[[str, str], None],
    ) -> None:
        self.bundle: str | None = None
        self._fetch = fetch
        self._on_done = on_done
        self._on_error = on_error
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def want(self, bundle: str) -> None:
        """Begins with `bundle`, and gives up whatever else was under way; one that is under way goes on."""
        if self.bundle == bundle and self._thread and self._thread.is_alive():
            return
        self.cancel()
        self.bundle = bundle
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(bundle, self._stop), name=f"fetch-{bundle[:8]}", daemon=True
        )
        self._thread.start()

    def cancel(self) -> None:
        """Ends what is under way, and waits for that at most `STOP_S` seconds; what has come is kept on disk."""
        self._stop.set()
        if self._thread:
            self._thread.join(STOP_S)
        self.bundle = self._thread = None

    def _run(self, bundle: str, stop: threading.Event) -> None:
        num_failures = 0
        while not stop.is_set():
            try:
                folder = self._fetch(bundle, stop)
            except ServiceAwayError as error:
                if stop.is_set():
                    return
                log.info("bundle %s: %s", bundle, error)
                self._on_error(bundle, f"{NOT_YET}{error}; it is tried again")
                stop.wait(
                    max(
                        RETRY_FACTOR * backoff_s(num_failures, random.random()), error.retry_after_s
                    )
                )
                num_failures += 1
            except FleetError as error:
                self._on_error(bundle, str(error))
                return
            except Exception as error:  # the outermost boundary of a thread
                log.exception("bundle %s cannot be fetched", bundle)
                self._on_error(bundle, f"it cannot be fetched: {error}")
                return
            else:
                self._on_done(bundle, folder)
                return
