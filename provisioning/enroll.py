"""Enrolment: a name enters the registry, and its identity folder is written."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from fleet.access import Role
from fleet.errors import ConfigError, IdentityError
from fleet.identity import IDENTITY_FILE, Identity
from fleet.registry.store import Registry
from fleet.topics import check_name
from provisioning.authority import CertificateAuthority, write_identity


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
    targets: Iterable[str] = (),
    bundle: Path | None = None,
    force: bool = False,
) -> Identity:
    """Enrols `name` and writes its identity folder `out`; the broker is at `host` and `port`.

    Args:
        group: a group that a device belongs to.
        targets: devices, or groups of them, that an app may send prompts to.
        bundle: the model that a device or worker serves; others have none.
        force: replaces an identity of the same name, and what is in `out`.

    Raises:
        TopicError: a name may not stand in a topic.
        ConfigError: targets for who is no app, or a group for who is no device.
        IdentityError: the name is taken, a target is not enrolled, or `out` holds another identity or cannot
            be written.
    """
    targets = tuple(check_name(target, "target") for target in targets)
    if targets and role is not Role.APP:
        raise ConfigError(f"only an app is allowed devices or groups; {name!r} is to be a {role}: leave --allow out")
    if group is not None and role is not Role.DEVICE:
        raise ConfigError(f"only a device belongs to a group; {name!r} is to be a {role}: leave --group out")
    if group is not None:
        check_name(group, "group")
    certificate = authority.certify(name, role)
    if not force:
        _check_free(out)
    registry.add_identity(
        name,
        role,
        group,
        targets,
        fingerprint=certificate.fingerprint,
        not_after=certificate.not_after,
        replace=force,
    )
    serves = bundle if role in (Role.DEVICE, Role.WORKER) else None
    return write_identity(certificate, name, role, out, host, port, serves)


def _check_free(out: Path) -> None:
    """Before the name is taken, so that a wrong folder costs nothing."""
    if (out / IDENTITY_FILE).exists():
        raise IdentityError(f"{out} holds an identity already; name another folder with --out")
    try:
        out.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise IdentityError(f"cannot make the folder {out}: {error.strerror}; name another with --out") from None
