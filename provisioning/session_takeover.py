"""Takeover of MQTT sessions, to close a connection at a broker that has no command for that.

A client that connects under a client id ends the older session of that id.
"""

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
    """Session takeover at the broker on `host` and `port`, with short-lived certificates.

    A certificate is valid for five minutes. Its key is on disk during one connection only, in a
    folder of mode 0700.
    """

    def __init__(self, authority: CertificateAuthority, host: str, port: int) -> None:
        self._authority = authority
        self._address = FleetAddress(host=host, port=port)
        self._spent: list[tuple[str, IssuedCertificate]] = []

    def evict(self, name: str) -> None:
        """End the session of the client `name`, if there is one.

        The broker then publishes the client's last will, if the client's rights allow that.

        Raises:
            LinkError: the broker cannot be reached.
            IdentityError: no temporary folder can be written.
        """
        certificate = self._authority.certify(name, Role.DEVICE, LIFE)
        self._spent.append((name, certificate.issued))
        with tempfile.TemporaryDirectory(prefix="fleet-eviction-") as folder:  # mode 0700
            config = self._address.identity_config(name, Role.DEVICE)
            identity = write_identity(certificate, Path(folder), config)
            MqttTransport.connect(identity, timeout_s=CONNECT_S).close()

    def spent(self, now: float) -> list[RevokedCertificate]:
        """Return the unexpired certificates of earlier evictions, for the revocation list."""
        self._spent = [(name, issued) for name, issued in self._spent if issued.not_after > now]
        return [
            RevokedCertificate(issued.serial, name, issued.not_before)
            for name, issued in self._spent
        ]
