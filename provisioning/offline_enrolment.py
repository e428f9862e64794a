"""Enrolment without the service: names enter the registry, and their identity folders are written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from fleet.errors import IdentityError
from fleet.identity.enrolment import Enrolment, check_all
from fleet.identity.identity import IDENTITY_FILE, Identity
from fleet.protocol.access import Role
from fleet.registry.store import Registry
from provisioning.authority import CertificateAuthority
from provisioning.certificate import write_identity
from provisioning.fleet_address import FleetAddress


def enroll(
    registry: Registry,
    authority: CertificateAuthority,
    name: str,
    role: Role,
    out: Path,
    *,
    host: str,
    port: int,
    group: str | None = None,
    tags: Mapping[str, str] | None = None,
    targets: Iterable[str] = (),
    bundle: Path | None = None,
    server: str | None = None,
    force: bool = False,
) -> Identity:
    """Enrols `name` and writes its identity folder `out`; the broker is at `host` and `port`.

    Args:
        group: a group that a device belongs to.
        tags: a device's tags.
        targets: devices, or groups of them, that an app may send prompts to.
        bundle: the model that a device or worker serves; others have none.
        server: the base URL of the fleet's service.
        force: replaces an identity of the same name, and what is in `out`.

    Raises:
        TopicError: a name may not stand in a topic.
        ConfigError: targets for who is no app, or a group or tags for who is no device.
        IdentityError: the name is taken, a target is not enrolled, or `out` holds another identity or cannot
            be written.
    """
    enrolment = Enrolment(
        name=name, role=role, group=group, tags=dict(tags or {}), targets=tuple(targets)
    )
    site = FleetAddress(host=host, port=port, server=server, bundle=bundle)
    (identity,) = enroll_all(registry, authority, {out: enrolment}, site, force=force)
    return identity


def enroll_all(
    registry: Registry,
    authority: CertificateAuthority,
    enrolments: Mapping[Path, Enrolment],
    site: FleetAddress,
    *,
    force: bool = False,
) -> Sequence[Identity]:
    """Enrols all, or none where one of them cannot be, and writes the folder of each.

    Raises:
        FleetError: as `enroll`.
    """
    check_all(list(enrolments.values()))
    certificates = {
        out: authority.certify(each.name, each.role) for out, each in enrolments.items()
    }
    if not force:
        for out in enrolments:
            _check_free(out)
    registry.add_certified(
        [(enrolments[out], made.issued) for out, made in certificates.items()], replace=force
    )
    return [
        write_identity(certificates[out], out, site.identity_config(each.name, each.role))
        for out, each in enrolments.items()
    ]


def _check_free(out: Path) -> None:
    """Before the name is taken, so that a wrong folder costs nothing."""
    if (out / IDENTITY_FILE).exists():
        raise IdentityError(f"{out} holds an identity already; name another folder with --out")
    try:
        out.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise IdentityError(
            f"cannot make the folder {out}: {error.strerror}; name another with --out"
        ) from None
