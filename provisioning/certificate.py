"""A certificate with its private key, and the identity folder made of it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fleet.errors import IdentityError
from fleet.identity.identity import (
    CA_FILE,
    CERT_FILE,
    IDENTITY_FILE,
    KEY_FILE,
    Identity,
    IdentityConfig,
)
from fleet.registry.results import IssuedCertificate
from fleet.utils.atomic_files import write_file


@dataclass(frozen=True)
class Certificate:
    """A certificate with its private key, and the authority's certificate, all PEM, in memory."""

    ca: bytes
    issued: IssuedCertificate
    private_key: bytes = field(repr=False)

    def write(self, folder: Path) -> None:
        """Write `ca.pem`, `cert.pem` and `key.pem` (mode 0600) into `folder`.

        Raises:
            IdentityError: the folder cannot be written.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_file(folder / KEY_FILE, self.private_key)
            write_file(folder / CERT_FILE, self.issued.pem.encode(), mode=0o644)
            write_file(folder / CA_FILE, self.ca, mode=0o644)
        except OSError as error:
            raise IdentityError(
                f"cannot write an identity into {folder}: {error.strerror}; choose another folder"
            ) from None


def write_identity(certificate: Certificate, out: Path, config: IdentityConfig) -> Identity:
    """Write an identity folder; `identity.json` comes last, so a folder that has it is complete.

    Raises:
        IdentityError: `out` cannot be written.
    """
    certificate.write(out)
    try:
        content = msgspec.json.format(msgspec.json.encode(config), indent=2) + b"\n"
        write_file(out / IDENTITY_FILE, content, mode=0o644)
    except OSError as error:
        raise IdentityError(
            f"cannot write {out / IDENTITY_FILE}: {error.strerror}; choose another folder"
        ) from None
    return Identity(out, config)


def issued_certificate(certificate: x509.Certificate) -> IssuedCertificate:
    """Return the record of a certificate for the registry."""
    key = certificate.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey), "the authority signs for nothing else"
    return IssuedCertificate(
        serial=f"{certificate.serial_number:x}",
        fingerprint=certificate.fingerprint(hashes.SHA256()).hex(),
        key_hash=hash_key(key),
        pem=certificate.public_bytes(serialization.Encoding.PEM).decode(),
        not_before=certificate.not_valid_before_utc.timestamp(),
        not_after=certificate.not_valid_after_utc.timestamp(),
    )


def hash_key(key: ec.EllipticCurvePublicKey) -> str:
    """Return the SHA-256 of the key's SPKI (RFC 5280 section 4.1.2.7), in hex."""
    spki = key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return hashlib.sha256(spki).hexdigest()
