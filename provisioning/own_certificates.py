"""Renewal of the fleet's own certificates on the machine that has the authority.

These are the certificates of the fleet's own identities, of its broker and of its service.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography import x509

from fleet.errors import IdentityError
from fleet.identity.certificate_rotation import finish_renewal, renewal_in_s, replace_pair
from fleet.identity.identity import CA_FILE, CERT_FILE, KEY_FILE, Identity, holds_pair
from fleet.utils.atomic_files import write_file
from provisioning.authority import CertificateAuthority

if TYPE_CHECKING:
    from fleet.registry.store import Registry


def is_due(folder: Path, now: float | None = None) -> bool:
    """Whether a certificate's life is two thirds over, or it or its key is missing or damaged.

    Raises:
        IdentityError: the folder cannot be read or written.
    """
    certificate = _read(folder)
    if certificate is None:
        return True
    begin = certificate.not_valid_before_utc.timestamp()
    end = certificate.not_valid_after_utc.timestamp()
    return renewal_in_s(begin, end, time.time() if now is None else now) == 0


def renew_own(registry: Registry, authority: CertificateAuthority, identity: Identity) -> None:
    """Replace the key, the certificate and `ca.pem` of an identity whose folder is on this machine.

    The old certificate may have expired. If it has not, it stays valid until it expires.

    Raises:
        UnknownDeviceError, StateError: the identity is not enrolled, or suspended or revoked.
        IdentityError: the files cannot be written.
    """
    config = identity.config
    certificate = authority.certify(config.name, config.role)
    registry.identities.recertify(config.name, config.role, certificate.issued)
    try:
        identity.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_file(identity.folder / CA_FILE, certificate.ca, mode=0o644)
        replace_pair(identity.folder, certificate.issued.pem.encode(), certificate.private_key)
        identity.save()
    except OSError as error:
        raise IdentityError(
            f"cannot write into {identity.folder}: {error.strerror}; make room"
        ) from None


def _read(folder: Path) -> x509.Certificate | None:
    """Return the certificate in `folder`; None unless it loads with its key."""
    try:
        finish_renewal(folder)
        if not holds_pair(folder / CERT_FILE, folder / KEY_FILE):
            return None
        return x509.load_pem_x509_certificate((folder / CERT_FILE).read_bytes())
    except OSError as error:
        raise IdentityError(
            f"cannot use the certificate in {folder}: {error.strerror}; check the folder's rights"
        ) from None
