"""A bundle's detached signature: ECDSA on P-256 with SHA-256 over the manifest's bytes, DER, in ``manifest.sig``."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fleet.bundles.manifest import MANIFEST_FILE
from fleet.errors import BundleError, ConfigError

SIGNATURE_FILE: Final = "manifest.sig"
ALGORITHM: Final = ec.ECDSA(hashes.SHA256())


def sign_bundle(folder: Path, key: Path) -> None:
    """Writes the signature by the private key in the PEM file `key`.

    Raises:
        ConfigError: that is no unencrypted P-256 private key.
    """
    try:
        private_key = serialization.load_pem_private_key(read_key(key), password=None)
    except (ValueError, TypeError) as error:
        raise wrong_key(key, "an unencrypted private key") from error
    if (
        not isinstance(private_key, ec.EllipticCurvePrivateKey)
        or private_key.curve.name != "secp256r1"
    ):
        raise wrong_key(key, "an unencrypted private key")
    write_signature(folder, private_key)


def write_signature(folder: Path, private_key: ec.EllipticCurvePrivateKey) -> None:
    """Writes the signature by a P-256 key, whole or not at all."""
    signature = private_key.sign((folder / MANIFEST_FILE).read_bytes(), ALGORITHM)
    partial = folder / f".{SIGNATURE_FILE}.partial"
    try:
        partial.write_bytes(signature)
        partial.replace(folder / SIGNATURE_FILE)
    finally:
        partial.unlink(missing_ok=True)


def check_signature(folder: Path, key: Path) -> None:
    """Checks the signature against the public key or certificate in the PEM file `key`.

    Raises:
        BundleError: the bundle is unsigned, or was signed by another key or altered afterwards.
        ConfigError: `key` holds neither.
    """
    public_key = load_public_key(key)
    path = folder / SIGNATURE_FILE
    if not path.is_file():
        raise BundleError(
            f"{folder} is unsigned: expected {SIGNATURE_FILE}; sign it with 'fleet bundle sign'"
        )
    try:
        public_key.verify(path.read_bytes(), (folder / MANIFEST_FILE).read_bytes(), ALGORITHM)
    except InvalidSignature:
        raise BundleError(
            f"{path} is no signature of {MANIFEST_FILE} by the key in {key}: the manifest was altered, or another key "
            "signed it; get the bundle again from who signed it"
        ) from None


def load_public_key(path: Path) -> ec.EllipticCurvePublicKey:
    """The P-256 key of a public key or certificate in PEM; raises ConfigError when there is none."""
    data = read_key(path)
    try:
        if b"BEGIN CERTIFICATE" in data:
            key = x509.load_pem_x509_certificate(data).public_key()
        else:
            key = serialization.load_pem_public_key(data)  # type: ignore[assignment]  # one of many kinds
    except ValueError as error:
        raise wrong_key(path, "a public key or certificate") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp256r1":
        raise wrong_key(path, "a public key or certificate")
    return key


def read_key(path: Path) -> bytes:
    """The file's bytes; raises ConfigError when it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"cannot read the key {path}: {error.strerror}; give --key the path of a PEM file"
        ) from None


def wrong_key(path: Path, kind: str) -> ConfigError:
    return ConfigError(
        f"{path}: expected {kind} in PEM on the curve P-256; make a pair with 'openssl ecparam -genkey -name "
        "prime256v1 -noout -out key.pem' and 'openssl ec -in key.pem -pubout -out public.pem'"
    )
