"""The certificate revocation list (CRL, RFC 5280 section 5).

The authority signs the list. A file holds it, and is replaced long before the list expires.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, Protocol

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fleet.errors import IdentityError
from fleet.utils.atomic_files import write_file

CRL_DAYS: Final = 7
RENEW_S: Final = 86_400.0
BEGIN_CRL: Final = b"-----BEGIN X509 CRL-----"
BACKDATED: Final = timedelta(minutes=5)
"""Time by which a list is backdated, so that a broker whose clock is slow accepts it."""


class CrlEntry(Protocol):
    """A revoked certificate.

    `serial` is in hex. `revoked_at` is in seconds since 1970, or None for a certificate on hold.
    """

    @property
    def serial(self) -> str: ...

    @property
    def revoked_at(self) -> float | None: ...


class CrlSigner(Protocol):
    """The signer of a list: the fleet's authority, during a rotation with its successor."""

    @property
    def issuers(self) -> frozenset[str]: ...

    def crl(self, revoked: Iterable[CrlEntry], days: int = CRL_DAYS) -> bytes: ...


def sign_crl(
    issuer: x509.Certificate,
    private_key: ec.EllipticCurvePrivateKey,
    revoked: Iterable[CrlEntry],
    days: int,
) -> bytes:
    """Sign the list of `revoked` as `issuer`; it is valid for `days`. Return PEM."""
    now = datetime.now(UTC)
    issuer_id = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(issuer.subject)
        .last_update(now - BACKDATED)
        .next_update(now + timedelta(days=days))
        .add_extension(x509.CRLNumber(time.time_ns() // 1_000_000), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer_id),
            critical=False,
        )
    )
    for certificate in revoked:
        builder = builder.add_revoked_certificate(_entry(certificate, now))
    return builder.sign(private_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _entry(certificate: CrlEntry, now: datetime) -> x509.RevokedCertificate:
    revoked_at = certificate.revoked_at
    builder = (
        x509.RevokedCertificateBuilder()
        .serial_number(int(certificate.serial, 16))
        .revocation_date(now if revoked_at is None else datetime.fromtimestamp(revoked_at, UTC))
    )
    if revoked_at is None:
        builder = builder.add_extension(
            x509.CRLReason(x509.ReasonFlags.certificate_hold), critical=False
        )
    return builder.build()


@dataclass(frozen=True)
class _CrlContent:
    """The content of a list: serials in hex, and its validity in seconds since 1970.

    A file has a list of each of its `issuers`, with the same serials.
    """

    issuers: frozenset[str]
    serials: frozenset[str]
    created_at: float
    expires_at: float


class CrlFile:
    """A list in a file, valid for seven days and replaced every day.

    A broker refuses every connection once its list has expired.
    """

    def __init__(self, path: Path, signer: CrlSigner) -> None:
        self.path = path
        self._signer = signer

    def update(self, revoked: Iterable[CrlEntry], now: float) -> frozenset[str] | None:
        """Write the list of `revoked` if it has changed or is due at `now`, in seconds since 1970.

        Returns:
            The serials that are new in the file; None if the file has not changed.

        Raises:
            IdentityError: the file cannot be written.
        """
        certificates = list(revoked)
        serials = frozenset(f"{int(certificate.serial, 16):x}" for certificate in certificates)
        current = self._read()
        due_at = min(current.created_at + RENEW_S, current.expires_at)
        is_complete = (current.serials, current.issuers) == (serials, self._signer.issuers)
        if is_complete and now < due_at:
            return None
        self._write(self._signer.crl(certificates))
        return serials - current.serials

    def _write(self, crl: bytes) -> None:
        try:
            write_file(self.path, crl)
        except OSError as error:
            raise IdentityError(
                f"cannot write {self.path}: {error.strerror}; choose another folder"
            ) from None

    def _read(self) -> _CrlContent:
        """Read the file; the content is empty and expired if the file is missing or malformed."""
        try:
            lists = _load_lists(self.path.read_bytes())
        except (OSError, ValueError):
            return _CrlContent(frozenset(), frozenset(), 0.0, 0.0)
        crl = lists[0]
        next_update = crl.next_update_utc
        return _CrlContent(
            issuers=frozenset(each.issuer.rfc4514_string() for each in lists),
            serials=frozenset(f"{entry.serial_number:x}" for entry in crl),
            created_at=crl.last_update_utc.timestamp(),
            expires_at=next_update.timestamp() if next_update else 0.0,
        )


def _load_lists(pem: bytes) -> list[x509.CertificateRevocationList]:
    """Load the lists in PEM, at least one. Raises ValueError."""
    parts = [part for part in pem.split(BEGIN_CRL) if part.strip()]
    return [x509.load_pem_x509_crl(BEGIN_CRL + part) for part in parts or [b""]]
