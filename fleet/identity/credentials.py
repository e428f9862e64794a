"""A device's own key, its certificate signing request, and the checks of the certificate."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fleet.errors import IdentityError


def new_key() -> bytes:
    """Make a P-256 private key: PKCS 8 in PEM, without a password."""
    return ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def signing_request(key: bytes, name: str | None = None) -> str:
    """Make a certificate signing request in PEM for `key`; its CN is `name` if that is known.

    Raises:
        IdentityError: `key` is no P-256 private key in PEM.
    """
    subject = [x509.NameAttribute(NameOID.COMMON_NAME, name)] if name else []
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name(subject))
    request = builder.sign(_load_key(key), hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM).decode()


def fingerprint(certificate: bytes) -> str:
    """Return the SHA-256 of the DER of a certificate in PEM, in hex. Raises IdentityError."""
    der = _load(certificate).public_bytes(serialization.Encoding.DER)
    return hashlib.sha256(der).hexdigest()


def only_first(certificate: bytes) -> bytes:
    """Return the first certificate in PEM without what follows it. Raises IdentityError."""
    return _load(certificate).public_bytes(serialization.Encoding.PEM)


def lifetime(certificate: bytes) -> tuple[float, float]:
    """Return begin and end of validity, in seconds since 1970. Raises IdentityError."""
    loaded = _load(certificate)
    return loaded.not_valid_before_utc.timestamp(), loaded.not_valid_after_utc.timestamp()


def check_certificate(certificate: bytes, key: bytes, ca: bytes, name: str, now: float) -> None:
    """Check that `certificate` is for our key, by our CA, for `name`, and valid `now`. All are PEM.

    `ca` holds one CA certificate, or two while the fleet's authority is rotated.

    Raises:
        IdentityError: the certificate is not usable.
    """
    loaded = _load(certificate)
    if loaded.public_key() != _load_key(key).public_key():
        raise IdentityError(
            "the certificate received is for another key than ours; ask the fleet's operator"
        )
    _check_issuer(loaded, ca)
    common_names = loaded.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    names = [attribute.value for attribute in common_names]
    if names != [name]:
        raise IdentityError(
            f"the certificate received is for {names}, expected {name}; ask the fleet's operator"
        )
    _check_validity(certificate, now)


def _check_issuer(certificate: x509.Certificate, ca: bytes) -> None:
    if not any(is_issued_by(certificate, authority) for authority in _load_all(ca)):
        raise IdentityError(
            "the certificate received is not by the fleet's CA; ask the fleet's operator"
        )


def is_issued_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Whether `authority` signed `certificate`."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def contains_authority(ca: bytes, ca_sha256: str) -> bool:
    """Whether a CA certificate in `ca` (PEM) has this SHA-256. Raises IdentityError."""
    return any(each.fingerprint(hashes.SHA256()).hex() == ca_sha256 for each in _load_all(ca))


def _check_validity(certificate: bytes, now: float) -> None:
    begin, end = lifetime(certificate)
    if not begin <= now < end:
        raise IdentityError(
            f"the certificate received is valid from {_day(begin)} to {_day(end)}, "
            f"and this machine's clock shows {_day(now)}; set the clock"
        )


def _load(certificate: bytes) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(certificate)
    except ValueError:
        raise IdentityError(
            f"expected a certificate in PEM, got {len(certificate)} bytes; ask the fleet's operator"
        ) from None


def _load_all(certificates: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(certificates)
    except ValueError:
        raise IdentityError(
            f"expected certificates in PEM, got {len(certificates)} bytes; ask the fleet's operator"
        ) from None


def is_key(key: bytes) -> bool:
    """Whether `key` is a P-256 private key in PEM."""
    try:
        _load_key(key)
    except IdentityError:
        return False
    return True


def _load_key(key: bytes) -> ec.EllipticCurvePrivateKey:
    try:
        loaded = serialization.load_pem_private_key(key, password=None)
    except (ValueError, TypeError) as error:
        raise IdentityError(
            f"the private key is not usable: {error}; remove key.pem and join again"
        ) from None
    if not isinstance(loaded, ec.EllipticCurvePrivateKey) or loaded.curve.name != "secp256r1":
        raise IdentityError(
            "expected a private key on the curve P-256; remove key.pem and join again"
        )
    return loaded


def _day(timestamp: float) -> str:
    return datetime.fromtimestamp(timestamp, UTC).strftime("%Y-%m-%d %H:%M UTC")
