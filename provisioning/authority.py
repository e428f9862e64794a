"""The fleet's certificate authority: P-256 keys, certificates for clients and for the broker (RFC 5280)."""

from __future__ import annotations

import ipaddress
import os
import tempfile
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

from fleet.access import Role
from fleet.errors import IdentityError
from fleet.identity import CA_FILE, CERT_FILE, IDENTITY_FILE, KEY_FILE, Identity, IdentityConfig, ServerTls
from fleet.signature import write_signature
from fleet.topics import check_name

CA_KEY_FILE: Final = "ca-key.pem"
CA_DAYS: Final = 3650
LEAF_DAYS: Final = 90
CLOCK_SKEW: Final = timedelta(minutes=5)
"""How far back a certificate is valid, for devices whose clock is behind."""


@dataclass(frozen=True)
class Certificate:
    """A certificate with its private key, and the authority's certificate, all PEM; not written anywhere yet."""

    ca: bytes
    certificate: bytes
    private_key: bytes = field(repr=False)
    fingerprint: str
    """SHA-256 of the certificate's DER, 64 hexadecimal digits."""
    not_after: float
    """End of its life, seconds since 1970."""

    def write(self, folder: Path) -> None:
        """Writes `ca.pem`, `cert.pem` and `key.pem` (mode 0600) into `folder`.

        Raises:
            IdentityError: the folder cannot be written.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            _write(folder / KEY_FILE, self.private_key, mode=0o600)
            _write(folder / CERT_FILE, self.certificate)
            _write(folder / CA_FILE, self.ca)
        except OSError as error:
            raise IdentityError(
                f"cannot write an identity into {folder}: {error.strerror}; choose another folder"
            ) from None


class CertificateAuthority:
    """Signs the certificates of one fleet. Its key stays in its folder (0700) in a file of mode 0600."""

    def __init__(self, certificate: x509.Certificate, private_key: ec.EllipticCurvePrivateKey) -> None:
        self._certificate = certificate
        self._private_key = private_key
        self._ca_pem = certificate.public_bytes(serialization.Encoding.PEM)

    @classmethod
    def create(cls, folder: Path) -> CertificateAuthority:
        """Makes a new authority in `folder`, whole or not at all.

        Raises:
            IdentityError: the folder holds something already, or cannot be written.
        """
        private_key = ec.generate_private_key(ec.SECP256R1())
        certificate = _sign_authority(private_key)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".ca-") as made:  # mode 0700
                content = Path(made) / "ca"
                content.mkdir(mode=0o700)
                _write(content / CA_KEY_FILE, _private_pem(private_key), mode=0o600)
                _write(content / CA_FILE, certificate.public_bytes(serialization.Encoding.PEM))
                content.rename(folder)
        except OSError as error:
            raise IdentityError(
                f"cannot make a certificate authority in {folder}: {error.strerror}; name an empty or new folder"
            ) from None
        return cls(certificate, private_key)

    @classmethod
    def load(cls, folder: Path) -> CertificateAuthority:
        """Raises IdentityError when the authority's files are missing or are none."""
        try:
            certificate = x509.load_pem_x509_certificate((folder / CA_FILE).read_bytes())
            private_key = serialization.load_pem_private_key((folder / CA_KEY_FILE).read_bytes(), password=None)
        except OSError as error:
            raise IdentityError(
                f"no certificate authority in {folder}: cannot read {Path(error.filename).name} ({error.strerror}); "
                "'fleet up' makes one"
            ) from None
        except (ValueError, TypeError) as error:
            raise IdentityError(f"the certificate authority in {folder} does not load: {error}") from None
        if not isinstance(private_key, ec.EllipticCurvePrivateKey) or (
            private_key.public_key() != certificate.public_key()
        ):
            raise IdentityError(f"{folder / CA_KEY_FILE} is not the key of {folder / CA_FILE}; restore both files")
        return cls(certificate, private_key)

    def certify(self, name: str, role: Role) -> Certificate:
        """A client's new key and certificate: CN is its name, OU its role, valid for 90 days.

        Raises:
            TopicError: `name` may not stand in a topic.
        """
        extensions: list[tuple[x509.ExtensionType, bool]] = [
            (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), False)
        ]
        return self._sign(check_name(name), role, extensions)

    def issue(self, name: str, role: Role, out: Path, host: str, port: int, bundle: Path | None = None) -> Identity:
        """Makes an identity and writes its folder `out`; `host` and `port` say where the broker is.

        Raises:
            TopicError: `name` may not stand in a topic.
            IdentityError: `out` cannot be written.
        """
        return write_identity(self.certify(name, role), name, role, out, host, port, bundle)

    def sign_bundle(self, folder: Path) -> None:
        """Signs the manifest of the bundle in `folder`; whoever has `ca.pem` can check it (`fleet.signature`)."""
        write_signature(folder, self._private_key)

    def server_tls(self, folder: Path, host: str) -> ServerTls:
        """The broker's certificate for `host`, ``localhost`` and the loopback addresses, written anew into `folder`.

        Raises:
            IdentityError: `host` is no host name or address, or the folder cannot be written.
        """
        names = [_general_name(name) for name in dict.fromkeys((host, "localhost", "127.0.0.1", "::1"))]
        extensions: list[tuple[x509.ExtensionType, bool]] = [
            (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False),
            (x509.SubjectAlternativeName(names), False),
        ]
        self._sign("broker", Role.SERVER, extensions).write(folder)
        return ServerTls(folder / CA_FILE, folder / CERT_FILE, folder / KEY_FILE)

    def _sign(self, name: str, role: Role, extensions: list[tuple[x509.ExtensionType, bool]]) -> Certificate:
        private_key = ec.generate_private_key(ec.SECP256R1())
        issuer_id = self._certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        builder = (
            _certificate(private_key.public_key(), _name(name, role), LEAF_DAYS)
            .issuer_name(self._certificate.subject)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(digital_signature=True), critical=True)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer_id), critical=False)
        )
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical)
        certificate = builder.sign(self._private_key, hashes.SHA256())
        return Certificate(
            ca=self._ca_pem,
            certificate=certificate.public_bytes(serialization.Encoding.PEM),
            private_key=_private_pem(private_key),
            fingerprint=certificate.fingerprint(hashes.SHA256()).hex(),
            not_after=certificate.not_valid_after_utc.timestamp(),
        )


def write_identity(
    certificate: Certificate, name: str, role: Role, out: Path, host: str, port: int, bundle: Path | None
) -> Identity:
    """Writes an identity folder; `identity.json` comes last, so a folder that has one is complete.

    Raises:
        IdentityError: `out` cannot be written.
    """
    config = IdentityConfig(name, role, host, port, str(bundle.resolve()) if bundle else None)
    certificate.write(out)
    try:
        _write(out / IDENTITY_FILE, msgspec.json.format(msgspec.json.encode(config), indent=2) + b"\n")
    except OSError as error:
        raise IdentityError(f"cannot write {out / IDENTITY_FILE}: {error.strerror}; choose another folder") from None
    return Identity(out, config)


def _sign_authority(private_key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "CE-CoLLM Fleet authority")])
    return (
        _certificate(private_key.public_key(), subject, CA_DAYS)
        .issuer_name(subject)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .sign(private_key, hashes.SHA256())
    )


def _certificate(key: ec.EllipticCurvePublicKey, subject: x509.Name, days: int) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _name(name: str, role: Role) -> x509.Name:
    attributes: list[tuple[ObjectIdentifier, str]] = [
        (NameOID.ORGANIZATIONAL_UNIT_NAME, role.value),
        (NameOID.COMMON_NAME, name),
    ]
    return x509.Name([x509.NameAttribute(oid, value) for oid, value in attributes])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return x509.DNSName(host)
    except ValueError:
        raise IdentityError(f"host {host[:80]!r}: expected a host name in ASCII or an IP address") from None


def _key_usage(
    *, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        encipher_only=False,
        decipher_only=False,
    )


def _private_pem(private_key: ec.EllipticCurvePrivateKey) -> bytes:
    return private_key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Replaces `path` by `data` in one step; it never has wider rights than `mode`."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")  # mode 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        Path(temporary).chmod(mode)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
