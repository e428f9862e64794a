"""Conditions and checks on devices that several queries share."""

from __future__ import annotations

from typing import Final

from sqlalchemy import ColumnElement, and_, exists, select
from sqlalchemy.orm import Session

from fleet.errors import UnknownDeviceError
from fleet.protocol.access import Role
from fleet.registry.identities.lifecycle import IdentityState
from fleet.registry.models import IdentityRecord, StatusRecord

MAX_NAMES_SHOWN: Final = 20


def has_device_role(name: str | None = None) -> ColumnElement[bool]:
    """Condition: the identity is a device or a deleted one, and has that name when it is given."""
    device = IdentityRecord.role == Role.DEVICE
    return device if name is None else and_(device, IdentityRecord.name == name)


def is_device(name: str | None = None) -> ColumnElement[bool]:
    """Condition: the identity is a device, and has that name when it is given."""
    return and_(has_device_role(name), IdentityRecord.state != IdentityState.DELETED)


def is_online() -> ColumnElement[bool]:
    """Condition: the device is active, and its newest status is online.

    A revoked device cannot publish its last will, so the status alone is not enough.
    """
    return and_(StatusRecord.online, IdentityRecord.state == IdentityState.ACTIVE)


def check_device(db: Session, device: str) -> None:
    """Raise UnknownDeviceError, which names the enrolled devices, unless `device` is enrolled."""
    if not db.scalar(select(exists().where(is_device(device)))):
        raise unknown_device(db, device)


def check_known_device(db: Session, device: str) -> None:
    """Raise UnknownDeviceError unless `device` is enrolled, or was until it was deleted."""
    if not db.scalar(select(exists().where(has_device_role(device)))):
        raise unknown_device(db, device)


def unknown_device(db: Session, device: str) -> UnknownDeviceError:
    """Return the error for a device that is not enrolled; it names those that are."""
    other = db.get(IdentityRecord, device)
    if other is not None and other.state != IdentityState.DELETED:
        return UnknownDeviceError(
            f"unknown device {device!r}: this identity has the role {other.role}; "
            "see 'fleet identities'"
        )
    names = db.scalars(
        select(IdentityRecord.name).where(is_device()).order_by(IdentityRecord.name)
    ).all()
    shown = ", ".join(names[:MAX_NAMES_SHOWN])
    if len(names) > MAX_NAMES_SHOWN:
        shown += ", ..."
    return UnknownDeviceError(
        f"unknown device {device[:80]!r}: enrolled are {shown or 'none'}; "
        f"enrol it with 'fleet enroll {device[:80]}'"
    )
