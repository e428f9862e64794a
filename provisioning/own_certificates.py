"""Renewal of the fleet's own certificates on the machine that has the authority.

These are the certificates of the fleet's own identities, of its broker and of its service.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes

from fleet.errors import IdentityError
from fleet.identity.certificate_rotation import finish_renewal, renewal_in_s, replace_pair
from fleet.identity.identity import CERT_FILE, Identity
from fleet.protocol.access import Role
from fleet.registry.results import IssuedCertificate
from provisioning.authority import CertificateAuthority

if TYPE_CHECKING:
    from fleet.registry.store import Registry


def is_due(folder: Path, now: float | None = None) -> bool:
    """Whether a certificate's life is two thirds over. Raises IdentityError if it does not load."""
    certificate = _read(folder)
    begin = certificate.not_valid_before_utc.timestamp()
    end = certificate.not_valid_after_utc.timestamp()
    return renewal_in_s(begin, end, time.time() if now is None else now) == 0


def renew_own(registry: Registry, authority: CertificateAuthority, identity: Identity) -> None:
    """Replace the key and the certificate of an identity whose folder is on this machine.

    The old certificate is accepted until it expires.

    Raises:
        StateError: the identity is not active.
        IdentityError: the files cannot be read or written.
    """
    config = identity.config
    old_certificate = _read(identity.folder)
    certificate = authority.certify(config.name, config.role)

    def issue(name: str, role: Role) -> IssuedCertificate:
        del name, role  # the registry finds them by the old certificate
        return certificate.issued

    fingerprint = old_certificate.fingerprint(hashes.SHA256()).hex()
    registry.identities.renew(fingerprint, certificate.issued.key_hash, issue)
    try:
        replace_pair(identity.folder, certificate.issued.pem.encode(), certificate.private_key)
    except OSError as error:
        raise IdentityError(
            f"cannot write into {identity.folder}: {error.strerror}; make room"
        ) from None


def _read(folder: Path) -> x509.Certificate:
    try:
        finish_renewal(folder)
        return x509.load_pem_x509_certificate((folder / CERT_FILE).read_bytes())
    except (OSError, ValueError) as error:
        raise IdentityError(
            f"the certificate in {folder} does not load: {error}; restore it"
        ) from None
