"""Renewal of the server's own identities, and of the certificate of broker and service."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from fleet.server.home import FleetHome
from provisioning.own_certificates import is_due

CHECK_S: Final = 3600.0


class CertificateRenewalTask:
    """A periodic task of the `ChangeWatcher`, which checks once an hour.

    `server_folders` hold certificates that the broker or the service presents; `reloads` make them
    present the new ones.
    """

    def __init__(
        self,
        home: FleetHome,
        server_folders: Sequence[Path],
        reloads: Sequence[Callable[[], None]],
    ) -> None:
        self._home = home
        self._server_folders = server_folders
        self._reloads = reloads
        self._pending_reloads: list[Callable[[], None]] = []  # those that have not succeeded yet
        self._next_check = 0.0

    def run(self) -> None:
        """Renew what is due.

        Raises:
            FleetError: a renewal or reload failed; the next call tries again.
        """
        now = time.monotonic()
        if now < self._next_check:
            return
        self._home.renew_own()
        if due := [folder for folder in self._server_folders if is_due(folder)]:
            self._pending_reloads = list(self._reloads)
            for folder in due:
                self._home.server_tls(folder)
        while self._pending_reloads:
            self._pending_reloads[0]()
            del self._pending_reloads[0]
        self._next_check = now + CHECK_S
