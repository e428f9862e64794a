"""The fleet's certificate authority (RFC 5280).

It issues P-256 certificates for clients, and for the server's broker and HTTPS service.
"""

from __future__ import annotations

import ipaddress
import tempfile
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

from fleet.bundles.signature import write_signature
from fleet.errors import IdentityError
from fleet.identity.credentials import is_issued_by
from fleet.identity.identity import CA_FILE, CERT_FILE, KEY_FILE, ServerTls
from fleet.protocol.access import Role
from fleet.protocol.topics import check_name
from fleet.registry.results import IssuedCertificate
from fleet.utils.atomic_files import write_file
from fleet.utils.text_files import describe_read_error
from provisioning.certificate import Certificate, issued_certificate
from provisioning.crl import CRL_DAYS, CrlEntry, sign_crl

CA_KEY_FILE: Final = "ca-key.pem"
CA_NAME: Final = "CE-CoLLM Fleet authority"
CA_DAYS: Final = 3650
LEAF_DAYS: Final = 90
LEAF_LIFE: Final = timedelta(days=LEAF_DAYS)
CLOCK_SKEW: Final = timedelta(minutes=5)
"""Time by which a certificate is backdated, so that devices whose clock is slow accept it."""


class CertificateAuthority:
    """The certificate authority of one fleet.

    The authority's folder has mode 0700, and the file with its key has mode 0600. If a passphrase
    was given, the key is encrypted. During a rotation the authority has a `successor`, which signs
    the certificates of clients. The old authority still signs the certificates of broker and HTTPS
    service, and the bundles, because devices with certificates from before the rotation trust only
    the old authority.
    """

    def __init__(
        self,
        certificate: x509.Certificate,
        private_key: ec.EllipticCurvePrivateKey,
        successor: CertificateAuthority | None = None,
    ) -> None:
        self.successor = successor
        self._certificate = certificate
        self._private_key = private_key
        self._ca_pem = certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def pem(self) -> str:
        """The CA certificates that the fleet trusts: the authority's, then the successor's."""
        return self._ca_pem.decode() + (self.successor.pem if self.successor else "")

    @property
    def issuers(self) -> frozenset[str]:
        """The names of the authority and its successor, as their revocation lists give them."""
        own = self._certificate.subject.rfc4514_string()
        return frozenset({own}) | (self.successor.issuers if self.successor else frozenset())

    def signed(self, certificate: x509.Certificate) -> bool:
        """Whether this authority, and not its successor, signed `certificate`."""
        return is_issued_by(certificate, self._certificate)

    def adopt(self, other: CertificateAuthority) -> None:
        """Replace this object's certificate, key and successor by those of `other`.

        Code that holds this object, such as the service, then uses the new ones.
        """
        self._certificate = other._certificate
        self._private_key = other._private_key
        self._ca_pem = other._ca_pem
        self.successor = other.successor

    @classmethod
    def create(
        cls, folder: Path, passphrase: str | None = None, *, name: str = CA_NAME
    ) -> CertificateAuthority:
        """Make a new authority in `folder`, atomically; a `passphrase` encrypts its key.

        A successor needs a different `name`: brokers find a revocation list by its issuer's name.

        Raises:
            IdentityError: the folder is not empty, or cannot be written.
        """
        private_key = ec.generate_private_key(ec.SECP256R1())
        certificate = _sign_authority(private_key, name)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            # The temporary directory has mode 0700.
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".ca-") as temporary:
                content = Path(temporary) / "ca"
                content.mkdir(mode=0o700)
                write_file(content / CA_KEY_FILE, _private_pem(private_key, passphrase))
                ca_pem = certificate.public_bytes(serialization.Encoding.PEM)
                write_file(content / CA_FILE, ca_pem, mode=0o644)
                content.rename(folder)
        except OSError as error:
            raise IdentityError(
                f"cannot make a certificate authority in {folder}: {error.strerror}; "
                "name an empty or new folder"
            ) from None
        return cls(certificate, private_key)

    @classmethod
    def load(cls, folder: Path, passphrase: str | None = None) -> CertificateAuthority:
        """Load an authority and its successor; only an encrypted key needs a `passphrase`.

        Raises:
            IdentityError: the authority's files are missing or malformed, or its key is encrypted
                and `passphrase` is missing or wrong.
        """
        try:
            finish_retirement(folder)
            certificate = x509.load_pem_x509_certificate((folder / CA_FILE).read_bytes())
            private_key = _load_key(folder / CA_KEY_FILE, passphrase)
        except OSError as error:
            remedy = "restore it; 'fleet up' makes an authority only if its folder is missing"
            reason = describe_read_error(Path(error.filename), error, remedy)
            raise IdentityError(f"no usable certificate authority in {folder}: {reason}") from None
        except (ValueError, TypeError) as error:
            raise IdentityError(
                f"the certificate authority in {folder} does not load: {error}"
            ) from None
        if not isinstance(private_key, ec.EllipticCurvePrivateKey) or (
            private_key.public_key() != certificate.public_key()
        ):
            raise IdentityError(
                f"{folder / CA_KEY_FILE} is not the key of {folder / CA_FILE}; restore both files"
            )
        next_folder = successor_folder(folder)
        successor = cls.load(next_folder, passphrase) if next_folder.exists() else None
        return cls(certificate, private_key, successor)

    @property
    def not_after(self) -> float:
        """End of the certificate's validity, in seconds since 1970."""
        return self._certificate.not_valid_after_utc.timestamp()

    def crl(self, revoked: Iterable[CrlEntry], days: int = CRL_DAYS) -> bytes:
        """Sign the revocation list; see `provisioning.crl`. Return PEM.

        The successor adds a list of its own: a broker needs one from each authority that it trusts.
        """
        entries = list(revoked)
        crl = sign_crl(self._certificate, self._private_key, entries, days)
        return crl + (self.successor.crl(entries, days) if self.successor else b"")

    def certify(self, name: str, role: Role, life: timedelta = LEAF_LIFE) -> Certificate:
        """Make a client's key, and `sign` its certificate. Raises TopicError for a bad `name`."""
        private_key = ec.generate_private_key(ec.SECP256R1())
        issued = self.sign(private_key.public_key(), name, role, life)
        return Certificate(self.pem.encode(), issued, _private_pem(private_key))

    def sign(
        self, key: ec.EllipticCurvePublicKey, name: str, role: Role, life: timedelta = LEAF_LIFE
    ) -> IssuedCertificate:
        """Issue a certificate for a client's public key, valid for `life`.

        Its subject has `name` as CN and `role` as OU. The successor signs it, if there is one.

        Raises:
            TopicError: `name` is not a valid name; see `check_name`.
        """
        if self.successor:
            return self.successor.sign(key, name, role, life)
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH])
        return self._sign(key, check_name(name), role, [usage], life)

    def sign_bundle(self, folder: Path) -> None:
        """Sign the manifest of a bundle; `ca.pem` verifies it (see `fleet.bundles.signature`)."""
        write_signature(folder, self._private_key)

    def server_tls(self, folder: Path, *hosts: str) -> ServerTls:
        """Issue a certificate for broker and HTTPS service, and write it into `folder`.

        It is valid for `hosts`, ``localhost`` and the loopback addresses.

        Raises:
            IdentityError: one of `hosts` is neither a host name nor an address, or the folder
                cannot be written.
        """
        unique_hosts = dict.fromkeys((*hosts, "localhost", "127.0.0.1", "::1"))
        extensions = [
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]),
            x509.SubjectAlternativeName([_general_name(host) for host in unique_hosts]),
        ]
        private_key = ec.generate_private_key(ec.SECP256R1())
        public_key = private_key.public_key()
        issued = self._sign(public_key, "broker", Role.SERVER, extensions, LEAF_LIFE)
        Certificate(self.pem.encode(), issued, _private_pem(private_key)).write(folder)
        return ServerTls(folder / CA_FILE, folder / CERT_FILE, folder / KEY_FILE)

    def _sign(
        self,
        key: ec.EllipticCurvePublicKey,
        name: str,
        role: Role,
        extensions: Sequence[x509.ExtensionType],
        life: timedelta,
    ) -> IssuedCertificate:
        issuer_id = self._certificate.extensions.get_extension_for_class(
            x509.SubjectKeyIdentifier
        ).value
        builder = (
            _certificate(key, _name(name, role), life)
            .issuer_name(self._certificate.subject)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(digital_signature=True), critical=True)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer_id),
                critical=False,
            )
        )
        for extension in extensions:
            builder = builder.add_extension(extension, critical=False)
        return issued_certificate(builder.sign(self._private_key, hashes.SHA256()))


def finish_retirement(folder: Path) -> None:
    """Complete an interrupted retirement: if `folder` is missing, rename the successor's to it."""
    successor = successor_folder(folder)
    if not folder.exists() and successor.exists():
        successor.rename(folder)


def successor_folder(folder: Path) -> Path:
    """The folder of the successor of the authority in `folder`."""
    return folder.with_name(f"{folder.name}-next")


def _sign_authority(private_key: ec.EllipticCurvePrivateKey, name: str) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    return (
        _certificate(private_key.public_key(), subject, timedelta(days=CA_DAYS))
        .issuer_name(subject)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .sign(private_key, hashes.SHA256())
    )


def _certificate(
    key: ec.EllipticCurvePublicKey, subject: x509.Name, life: timedelta
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + life)
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
        raise IdentityError(
            f"host {host[:80]!r}: expected a host name in ASCII or an IP address"
        ) from None


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


def _private_pem(private_key: ec.EllipticCurvePrivateKey, passphrase: str | None = None) -> bytes:
    encryption = (
        serialization.BestAvailableEncryption(passphrase.encode())
        if passphrase
        else serialization.NoEncryption()
    )
    return private_key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption
    )


def _load_key(path: Path, passphrase: str | None) -> PrivateKeyTypes:
    """Load a private key. Raises IdentityError without the right `passphrase`.

    Raises OSError, TypeError or ValueError if the file cannot be read or holds no private key.
    """
    data = path.read_bytes()
    if b"BEGIN ENCRYPTED PRIVATE KEY" not in data:
        return serialization.load_pem_private_key(data, password=None)
    if not passphrase:
        raise IdentityError(
            f"{path} is encrypted: expected its passphrase in the environment as "
            "FLEET_CA_PASSPHRASE"
        )
    try:
        return serialization.load_pem_private_key(data, passphrase.encode())
    except ValueError:
        raise IdentityError(
            f"{path} does not open with this passphrase; set the right FLEET_CA_PASSPHRASE"
        ) from None
