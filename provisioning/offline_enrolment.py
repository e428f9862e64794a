"""Offline enrolment: names enter the registry and their identity folders are written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fleet.errors import IdentityError
from fleet.identity.enrolment import Enrolment, check_enrolments
from fleet.identity.identity import IDENTITY_FILE, Identity, check_identity_folder
from fleet.registry.store import Registry
from provisioning.authority import CertificateAuthority
from provisioning.certificate import write_identity
from provisioning.fleet_address import FleetAddress


def enroll_offline(
    registry: Registry,
    authority: CertificateAuthority,
    enrolments: Mapping[Path, Enrolment],
    address: FleetAddress,
    *,
    force: bool = False,
) -> list[Identity]:
    """Enrol all or none, and write the identity folders, which are the keys of `enrolments`.

    `force` replaces identities of the same name, and the content of their folders. A folder of
    another name is never replaced.

    Raises:
        TopicError: a name may not stand in a topic.
        ConfigError: an enrolment does not fit its role: targets are for apps, groups and tags for
            devices.
        IdentityError: a name is enrolled already, a target is not enrolled, or a folder cannot be
            written or holds an identity already.
    """
    check_enrolments(list(enrolments.values()))
    certificates = {
        out: authority.certify(enrolment.name, enrolment.role)
        for out, enrolment in enrolments.items()
    }
    for out, enrolment in enrolments.items():
        check_identity_folder(out, enrolment.name)
        if not force:
            _check_free(out)
    registry.identities.add_certified(
        [(enrolments[out], certificate.issued) for out, certificate in certificates.items()],
        replace=force,
    )
    return [
        write_identity(
            certificates[out], out, address.identity_config(enrolment.name, enrolment.role)
        )
        for out, enrolment in enrolments.items()
    ]


def _check_free(out: Path) -> None:
    """Check that a folder holds no identity, and make the folder if it is missing."""
    if (out / IDENTITY_FILE).exists():
        raise IdentityError(f"{out} holds an identity already; name another folder with --out")
    try:
        out.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise IdentityError(
            f"cannot make the folder {out}: {error.strerror}; name another with --out"
        ) from None
