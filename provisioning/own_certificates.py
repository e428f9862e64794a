"""The fleet's own certificates, renewed where the authority is: its identities', and its broker's and service's."""

from __future__ import annotations

import time
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes

from fleet.errors import IdentityError
from fleet.identity.certificate_rotation import finish_renewal, renewal_in_s, replace_pair
from fleet.identity.identity import CERT_FILE, Identity
from fleet.protocol.access import Role
from fleet.registry.results import IssuedCertificate
from fleet.registry.store import Registry
from provisioning.authority import CertificateAuthority


def is_due(folder: Path, now: float | None = None) -> bool:
    """Whether two thirds of the life of the certificate in `folder` are over. Raises IdentityError."""
    certificate = _read(folder)
    begin = certificate.not_valid_before_utc.timestamp()
    end = certificate.not_valid_after_utc.timestamp()
    return renewal_in_s(begin, end, time.time() if now is None else now) == 0


def renew_own(registry: Registry, authority: CertificateAuthority, identity: Identity) -> None:
    """A new key and certificate for an identity whose folder is here; the old certificate counts until it ends.

    Raises:
        StateError: the identity is not active.
        IdentityError: the files cannot be read or written.
    """
    config = identity.config
    old = _read(identity.folder)
    made = authority.certify(config.name, config.role)

    def issue(name: str, role: Role) -> IssuedCertificate:
        del name, role  # as in the registry, which has found them by the certificate
        return made.issued

    registry.renew(old.fingerprint(hashes.SHA256()).hex(), made.issued.key_hash, issue)
    try:
        replace_pair(identity.folder, made.issued.pem.encode(), made.private_key)
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
