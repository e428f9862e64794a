"""A bundle's detached signature in ``manifest.sig``.

It is ECDSA on P-256 with SHA-256 over the manifest's bytes, in DER.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey as PrivateKey

from fleet.bundles.manifest import MANIFEST_FILE
from fleet.errors import BundleError, ConfigError
from fleet.utils.atomic_files import write_file
from fleet.utils.text_files import read_bytes

SIGNATURE_FILE: Final = "manifest.sig"
CURVE: Final = "secp256r1"  # P-256
GIVE_KEY: Final = "give --key the path of a PEM file"
ALGORITHM: Final = ec.ECDSA(hashes.SHA256())


def sign_bundle(folder: Path, key: Path) -> None:
    """Sign the bundle in `folder` with the private key in the PEM file `key`.

    Raises:
        ConfigError: the file holds no unencrypted P-256 private key.
    """
    try:
        private_key = serialization.load_pem_private_key(read_bytes(key, GIVE_KEY), password=None)
    except (ValueError, TypeError) as error:
        raise _wrong_key(key, "an unencrypted private key") from error
    if not isinstance(private_key, PrivateKey) or private_key.curve.name != CURVE:
        raise _wrong_key(key, "an unencrypted private key")
    write_signature(folder, private_key)


def write_signature(folder: Path, private_key: PrivateKey) -> None:
    """Write the signature by a P-256 key, complete or not at all."""
    signature = private_key.sign((folder / MANIFEST_FILE).read_bytes(), ALGORITHM)
    write_file(folder / SIGNATURE_FILE, signature, mode=0o644)


def check_signature(folder: Path, key: Path) -> None:
    """Check the signature against the public key or certificates in the PEM file `key`.

    The file has several certificates while the fleet's authority is rotated; one of them suffices.

    Raises:
        BundleError: the bundle is unsigned, signed by another key, or altered since.
        ConfigError: `key` holds no P-256 public key or certificate.
    """
    _load_public_keys(key)
    path = folder / SIGNATURE_FILE
    if not path.is_file():
        raise BundleError(
            f"{folder} is unsigned: expected {SIGNATURE_FILE}; sign it with 'fleet bundle sign'"
        )
    if not is_signed(folder, key):
        raise BundleError(
            f"{path} is no signature of {MANIFEST_FILE} by the key in {key}: the manifest was "
            "altered, or another key signed it; get the bundle again from its signer"
        )


def is_signed(folder: Path, key: Path) -> bool:
    """Whether a key in the PEM file `key` has signed the manifest in `folder`.

    Raises:
        ConfigError: `key` holds no P-256 public key or certificate.
        OSError: the manifest or its signature cannot be read.
    """
    public_keys = _load_public_keys(key)
    signature = (folder / SIGNATURE_FILE).read_bytes()
    manifest = (folder / MANIFEST_FILE).read_bytes()
    return any(_has_signed(each, signature, manifest) for each in public_keys)


def _has_signed(key: ec.EllipticCurvePublicKey, signature: bytes, manifest: bytes) -> bool:
    try:
        key.verify(signature, manifest, ALGORITHM)
    except InvalidSignature:
        return False
    return True


def _load_public_keys(path: Path) -> list[ec.EllipticCurvePublicKey]:
    """Load the P-256 keys of a public key or of certificates in PEM.

    Raises:
        ConfigError: the file holds neither.
    """
    data = read_bytes(path, GIVE_KEY)
    try:
        if b"BEGIN CERTIFICATE" in data:
            keys = [each.public_key() for each in x509.load_pem_x509_certificates(data)]
        else:
            keys = [serialization.load_pem_public_key(data)]  # type: ignore[list-item]
    except ValueError as error:
        raise _wrong_key(path, "a public key or certificate") from error
    p256_keys = [
        key
        for key in keys
        if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name == CURVE
    ]
    if len(p256_keys) < len(keys):
        raise _wrong_key(path, "a public key or certificate")
    return p256_keys


def _wrong_key(path: Path, kind: str) -> ConfigError:
    return ConfigError(
        f"{path}: expected {kind} in PEM on the curve P-256; "
        "make a pair with 'openssl ecparam -genkey -name prime256v1 -noout -out key.pem' and "
        "'openssl ec -in key.pem -pubout -out public.pem'"
    )
