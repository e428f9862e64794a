"""Closes a connection at a broker that we cannot tell to: whoever connects under a client id ends its older session."""

from __future__ import annotations

import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Final

from fleet.protocol.access import Role
from fleet.registry.results import IssuedCertificate, RevokedCertificate
from fleet.transport.mqtt import MqttTransport
from provisioning.authority import CertificateAuthority
from provisioning.certificate import write_identity
from provisioning.fleet_address import FleetAddress

LIFE: Final = timedelta(minutes=5)
CONNECT_S: Final = 2.0


class SessionTakeover:
    """Takes over the sessions of names at the broker on `host` and `port`, with certificates that live five minutes.

    Their keys are on disk for the length of one connection, in a folder of ours alone.
    """

    def __init__(self, authority: CertificateAuthority, host: str, port: int) -> None:
        self._authority = authority
        self._site = FleetAddress(host=host, port=port)
        self._spent: list[tuple[str, IssuedCertificate]] = []

    def evict(self, name: str) -> None:
        """Ends the session of `name`, if it has one; its last will is sent as far as its rights still reach.

        Raises:
            LinkError: the broker cannot be reached.
            IdentityError: no temporary folder can be written.
        """
        made = self._authority.certify(name, Role.DEVICE, LIFE)
        self._spent.append((name, made.issued))
        with tempfile.TemporaryDirectory(prefix="fleet-eviction-") as folder:  # mode 0700
            identity = write_identity(
                made, Path(folder), self._site.identity_config(name, Role.DEVICE)
            )
            MqttTransport.connect(identity, timeout_s=CONNECT_S).close()

    def spent(self, now: float) -> list[RevokedCertificate]:
        """The certificates of earlier evictions that have not ended yet: they belong on the revocation list."""
        self._spent = [(name, issued) for name, issued in self._spent if issued.not_after > now]
        return [
            RevokedCertificate(issued.serial, name, issued.not_before)
            for name, issued in self._spent
        ]
