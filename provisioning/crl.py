"""The revocation list (CRL, RFC 5280 section 5): signed by the authority, kept in a file, renewed early."""

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

CRL_DAYS: Final = 7
RENEW_S: Final = 86_400.0
BACKDATED: Final = timedelta(minutes=5)
"""A list counts from so long before it is made, for a broker whose clock is behind."""


class Revoked(Protocol):
    """A certificate that may not be used; `serial` in hex, `revoked_at` in seconds since 1970, None while on hold."""

    @property
    def serial(self) -> str: ...

    @property
    def revoked_at(self) -> float | None: ...


class Signer(Protocol):
    """What signs a list: the fleet's authority."""

    def crl(self, revoked: Iterable[Revoked], days: int = CRL_DAYS) -> bytes: ...


def sign_crl(
    issuer: x509.Certificate,
    private_key: ec.EllipticCurvePrivateKey,
    revoked: Iterable[Revoked],
    days: int,
) -> bytes:
    """The list of `revoked` as PEM, signed by `issuer`, with `days` to live."""
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


def _entry(certificate: Revoked, now: datetime) -> x509.RevokedCertificate:
    at = certificate.revoked_at
    builder = (
        x509.RevokedCertificateBuilder()
        .serial_number(int(certificate.serial, 16))
        .revocation_date(now if at is None else datetime.fromtimestamp(at, UTC))
    )
    if at is None:
        builder = builder.add_extension(
            x509.CRLReason(x509.ReasonFlags.certificate_hold), critical=False
        )
    return builder.build()


@dataclass(frozen=True)
class _Listed:
    """What a list says: serials in hex, and its span in seconds since 1970."""

    serials: frozenset[str]
    made_at: float
    ends_at: float


class CrlFile:
    """A list in a file. A broker that finds it expired lets nobody in, so it is made anew every day of its seven."""

    def __init__(self, path: Path, signer: Signer) -> None:
        self.path = path
        self._signer = signer

    def update(self, revoked: Iterable[Revoked], now: float) -> frozenset[str] | None:
        """Makes the file say what is `revoked` at `now`; the serials that are new in it, None if nothing was to do.

        Raises:
            IdentityError: the file cannot be written.
        """
        certificates = list(revoked)
        wanted = frozenset(f"{int(certificate.serial, 16):x}" for certificate in certificates)
        listed = self._read()
        if listed.serials == wanted and now < min(listed.made_at + RENEW_S, listed.ends_at):
            return None
        replace_file(self.path, self._signer.crl(certificates))
        return wanted - listed.serials

    def _read(self) -> _Listed:
        """What stands in the file; nothing, since ever, when it is missing or is none."""
        try:
            crl = x509.load_pem_x509_crl(self.path.read_bytes())
        except (OSError, ValueError):
            return _Listed(frozenset(), 0.0, 0.0)
        ends = crl.next_update_utc
        return _Listed(
            frozenset(f"{entry.serial_number:x}" for entry in crl),
            crl.last_update_utc.timestamp(),
            ends.timestamp() if ends else 0.0,
        )


def replace_file(path: Path, data: bytes) -> None:
    """Puts `data` in the place of a file in one step, for its owner alone.

    Raises:
        IdentityError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.new")
    try:
        temporary.touch(mode=0o600)
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        raise IdentityError(
            f"cannot write {path}: {error.strerror}; choose another folder"
        ) from None
