"""Rotation of the fleet's authority: a successor signs, and later replaces it.

Between `rotate_authority` and `retire_authority` the fleet trusts both. The successor signs the
certificates of clients, and each renewal brings both CA certificates. The old authority still signs
the certificates of broker and HTTPS service, and the bundles, for devices that have not renewed
their certificate yet. The old authority can be retired when no identity uses a certificate that it
has signed.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes

from fleet.bundles.signature import SIGNATURE_FILE
from fleet.errors import IdentityError, StateError
from provisioning.authority import CA_NAME, CertificateAuthority, successor_folder

MAX_NAMES: Final = 5


def rotate_authority(folder: Path, passphrase: str | None) -> CertificateAuthority:
    """Make a successor of the authority in `folder`; return the authority with it.

    Raises:
        StateError: there is a successor already.
        IdentityError: the authority does not load, or the successor cannot be written.
    """
    authority = CertificateAuthority.load(folder, passphrase)
    if authority.successor:
        raise StateError(
            "the authority is being rotated already; end that with 'fleet authority retire'"
        )
    name = f"{CA_NAME}, successor of {ca_sha256(authority)[:16]}"
    CertificateAuthority.create(successor_folder(folder), passphrase, name=name)
    return CertificateAuthority.load(folder, passphrase)


def not_renewed(
    authority: CertificateAuthority, certificates: Iterable[tuple[str, str]]
) -> list[str]:
    """Return the names whose certificate the authority signed, and not its successor.

    `certificates` are names with the newest certificate of each, in PEM.
    """
    return [
        name
        for name, pem in certificates
        if authority.signed(x509.load_pem_x509_certificate(pem.encode()))
    ]


def check_retirable(authority: CertificateAuthority, left: list[str]) -> None:
    """Check that no identity needs the authority; `left` is the result of `not_renewed`.

    Raises:
        StateError: the authority has no successor, or some identities were not renewed.
    """
    if authority.successor is None:
        raise StateError(
            "the authority has no successor; make one first with 'fleet authority rotate'"
        )
    if left:
        more = ", ..." if len(left) > MAX_NAMES else ""
        raise StateError(
            f"{len(left)} identities still use certificates of the old authority: "
            f"{', '.join(left[:MAX_NAMES])}{more}; wait until they have renewed themselves, renew "
            "them with 'fleet renew', or lock them out with --force"
        )


def retire_authority(
    folder: Path, stores: Iterable[Path], passphrase: str | None
) -> CertificateAuthority:
    """Replace the authority in `folder` by its successor, and remove the old key.

    First the successor signs all bundles and versions of software in the folders `stores`. If the
    command dies in between, it can be repeated.

    Raises:
        IdentityError: the files cannot be read or written.
    """
    authority = CertificateAuthority.load(folder, passphrase)
    successor = authority.successor
    if successor is None:
        raise StateError("the authority has no successor to be replaced by")
    retired = folder.with_name(f"{folder.name}-retired")
    try:
        for store in stores:
            for signature in sorted(store.glob(f"*/{SIGNATURE_FILE}")):
                successor.sign_bundle(signature.parent)
        shutil.rmtree(retired, ignore_errors=True)
        folder.rename(retired)
        successor_folder(folder).rename(folder)
        shutil.rmtree(retired)
    except OSError as error:
        raise IdentityError(
            f"cannot replace the authority in {folder}: {error.strerror}; make room, check the "
            "folder's rights, and repeat the command"
        ) from None
    return successor


def ca_sha256(authority: CertificateAuthority) -> str:
    """Return the SHA-256 of the authority's own certificate, as in enrolment tokens."""
    certificate = x509.load_pem_x509_certificate(authority.pem.encode())
    return certificate.fingerprint(hashes.SHA256()).hex()
