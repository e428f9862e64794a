"""Identities for tests: issued without a registry, or enrolled in one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from fleet.identity.enrolment import Enrolment
from fleet.identity.identity import Identity
from fleet.protocol.access import Role
from fleet.registry.store import Registry
from provisioning.authority import CertificateAuthority
from provisioning.certificate import write_identity
from provisioning.fleet_address import FleetAddress
from provisioning.offline_enrolment import enroll_offline


def issue_identity(
    authority: CertificateAuthority,
    name: str,
    role: Role,
    out: Path,
    *,
    host: str = "localhost",
    port: int = 8883,
    bundle: Path | None = None,
) -> Identity:
    """Write an identity that no registry knows to the folder `out`."""
    address = FleetAddress(host=host, port=port, bundle=bundle)
    return write_identity(authority.certify(name, role), out, address.identity_config(name, role))


def enroll_identity(
    registry: Registry,
    authority: CertificateAuthority,
    name: str,
    role: Role,
    out: Path,
    *,
    host: str = "localhost",
    port: int = 8883,
    group: str | None = None,
    tags: Mapping[str, str] | None = None,
    targets: Iterable[str] = (),
    bundle: Path | None = None,
    force: bool = False,
) -> Identity:
    """Enrol `name` and write its identity to the folder `out`."""
    enrolment = Enrolment(
        name=name, role=role, group=group, tags=dict(tags or {}), targets=tuple(targets)
    )
    address = FleetAddress(host=host, port=port, bundle=bundle)
    (identity,) = enroll_offline(registry, authority, {out: enrolment}, address, force=force)
    return identity
