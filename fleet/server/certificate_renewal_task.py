"""Renewal of the server's own identities, and of the certificate of broker and service."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from fleet.identity.identity import CA_FILE
from fleet.server.home import FleetHome
from provisioning.authority import CertificateAuthority
from provisioning.own_certificates import is_due

CHECK_S: Final = 3600.0


class CertificateRenewalTask:
    """A periodic task of the `ChangeWatcher`, which checks once an hour, and after a rotation.

    `server_folders` hold the certificates that the broker and the service present. `reloads` make
    both present the new ones. `authority` is the object with which a running service signs.
    """

    def __init__(
        self,
        home: FleetHome,
        server_folders: Sequence[Path],
        reloads: Sequence[Callable[[], None]],
        authority: CertificateAuthority | None = None,
    ) -> None:
        self._home = home
        self._server_folders = server_folders
        self._reloads = reloads
        self._pending_reloads: list[Callable[[], None]] = []  # those that have not succeeded yet
        self._authority = authority
        self._next_check = 0.0

    def run(self) -> None:
        """Renew what is due.

        Raises:
            FleetError: a renewal or reload failed; the next call tries again.
        """
        now = time.monotonic()
        if self._follow_rotation():
            self._next_check = now
        if now < self._next_check:
            return
        trusted_ca = self._home.trusted_ca()
        if due := [each for each in self._server_folders if _is_outdated(each, trusted_ca)]:
            self._pending_reloads = list(self._reloads)
            for folder in due:
                self._home.server_tls(folder)
        while self._pending_reloads:
            self._pending_reloads[0]()
            del self._pending_reloads[0]
        self._home.renew_own()  # after the broker, which has to trust the new certificates
        self._next_check = now + CHECK_S

    def _follow_rotation(self) -> bool:
        """Sign with the authority's successor, if a command has made or installed one."""
        if self._authority is None or self._authority.pem == self._home.trusted_ca():
            return False
        self._authority.adopt(self._home.authority())
        return True


def _is_outdated(folder: Path, trusted_ca: str) -> bool:
    """Whether a server's folder needs a new certificate, or its `ca.pem` is out of date."""
    ca = folder / CA_FILE
    return is_due(folder) or not ca.exists() or ca.read_text(encoding="utf-8") != trusted_ca
