"""Closes a connection at a broker that we cannot tell to: whoever connects under a client id ends its older session."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Final

from cryptography import x509

from fleet.access import Role
from fleet.mqtt import MqttTransport
from provisioning.authority import CertificateAuthority, write_identity

LIFE: Final = timedelta(minutes=5)
CONNECT_S: Final = 2.0


@dataclass(frozen=True)
class SpentCertificate:
    """A certificate that was made for one eviction, and belongs on the revocation list until it ends."""

    serial: str
    name: str
    revoked_at: float | None
    not_after: float


class Evictions:
    """Takes over the sessions of names at the broker on `host` and `port`, with certificates that live five minutes.

    Their keys are on disk for the length of one connection, in a folder of ours alone.
    """

    def __init__(self, authority: CertificateAuthority, host: str, port: int) -> None:
        self._authority = authority
        self._host = host
        self._port = port
        self._spent: list[SpentCertificate] = []

    def evict(self, name: str) -> None:
        """Ends the session of `name`, if it has one; its last will is sent as far as its rights still reach.

        Raises:
            LinkError: the broker cannot be reached.
            IdentityError: no temporary folder can be written.
        """
        made = self._authority.certify(name, Role.DEVICE, LIFE)
        serial = x509.load_pem_x509_certificate(made.certificate).serial_number
        self._spent.append(SpentCertificate(f"{serial:x}", name, time.time(), made.not_after))
        with tempfile.TemporaryDirectory(prefix="fleet-eviction-") as folder:  # mode 0700
            identity = write_identity(made, name, Role.DEVICE, Path(folder), self._host, self._port, None)
            MqttTransport.connect(identity, timeout_s=CONNECT_S).close()

    def spent(self, now: float) -> list[SpentCertificate]:
        """The certificates of earlier evictions that have not ended yet."""
        self._spent = [certificate for certificate in self._spent if certificate.not_after > now]
        return self._spent
