"""What a server that runs for months has to renew: its own identities, and the certificate of broker and service."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from fleet.server.home import FleetHome
from fleet.utils.optional_imports import load

CHECK_S: Final = 3600.0


class CertificateRenewalTask:
    """A periodic task of the `ChangeWatcher`, which looks once an hour.

    `server_folders` hold certificates that the broker or the service shows, and `reloads` make them show new ones.
    """

    def __init__(
        self,
        state: FleetHome,
        server_folders: Sequence[Path],
        reloads: Sequence[Callable[[], None]],
    ) -> None:
        self._state = state
        self._server_folders = server_folders
        self._reloads = reloads
        self._waiting: list[Callable[[], None]] = []  # reloads that have not succeeded yet
        self._next_check = 0.0

    def tend(self) -> None:
        """Renews what is due; raises FleetError when that fails, and tries again the next time."""
        now = time.monotonic()
        if now < self._next_check:
            return
        self._state.renew_own()
        is_due = load("provisioning.own_certificates").is_due
        if due := [folder for folder in self._server_folders if is_due(folder)]:
            self._waiting = list(self._reloads)
            for folder in due:
                self._state.server_tls(folder)
        while self._waiting:
            self._waiting[0]()
            del self._waiting[0]
        self._next_check = now + CHECK_S
