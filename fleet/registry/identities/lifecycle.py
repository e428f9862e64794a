"""The states of an identity, and their legal order as a table."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from fleet.errors import StateError


class IdentityState(StrEnum):
    """The state of an identity.

    `expired` is never stored: an active or suspended identity is expired once its certificate
    has ended. A deleted identity is only a name, with the statistics of the device and with its
    certificates, which stay on the revocation list until they end.
    """

    PENDING = "pending"
    ACTIVE = "active"
    SUSPENDED = "suspended"
    REVOKED = "revoked"
    EXPIRED = "expired"
    DELETED = "deleted"


class IdentityChange(StrEnum):
    """A change to an identity."""

    ENROLL = "enroll"
    JOIN = "join"
    RENEW = "renew"
    INVITE = "invite"  # by a new token, without other changes
    RECERTIFY = "recertify"  # by the holder of the authority's key
    SUSPEND = "suspend"
    RESUME = "resume"
    REVOKE = "revoke"
    DELETE = "delete"


LEGAL: Final[dict[tuple[IdentityState, IdentityChange], IdentityState]] = {
    (IdentityState.PENDING, IdentityChange.ENROLL): IdentityState.PENDING,
    (IdentityState.PENDING, IdentityChange.JOIN): IdentityState.ACTIVE,
    (IdentityState.PENDING, IdentityChange.INVITE): IdentityState.PENDING,
    (IdentityState.PENDING, IdentityChange.RECERTIFY): IdentityState.ACTIVE,
    (IdentityState.PENDING, IdentityChange.REVOKE): IdentityState.REVOKED,
    (IdentityState.PENDING, IdentityChange.DELETE): IdentityState.DELETED,
    # The same key joins again after its reply was lost.
    (IdentityState.ACTIVE, IdentityChange.JOIN): IdentityState.ACTIVE,
    (IdentityState.ACTIVE, IdentityChange.RENEW): IdentityState.ACTIVE,
    (IdentityState.ACTIVE, IdentityChange.INVITE): IdentityState.ACTIVE,
    (IdentityState.ACTIVE, IdentityChange.RECERTIFY): IdentityState.ACTIVE,
    (IdentityState.ACTIVE, IdentityChange.SUSPEND): IdentityState.SUSPENDED,
    (IdentityState.ACTIVE, IdentityChange.REVOKE): IdentityState.REVOKED,
    (IdentityState.SUSPENDED, IdentityChange.RESUME): IdentityState.ACTIVE,
    (IdentityState.SUSPENDED, IdentityChange.REVOKE): IdentityState.REVOKED,
    (IdentityState.EXPIRED, IdentityChange.ENROLL): IdentityState.PENDING,
    (IdentityState.EXPIRED, IdentityChange.INVITE): IdentityState.PENDING,
    (IdentityState.EXPIRED, IdentityChange.RECERTIFY): IdentityState.ACTIVE,
    (IdentityState.EXPIRED, IdentityChange.REVOKE): IdentityState.REVOKED,
    (IdentityState.REVOKED, IdentityChange.ENROLL): IdentityState.PENDING,
    (IdentityState.REVOKED, IdentityChange.REVOKE): IdentityState.REVOKED,
    (IdentityState.REVOKED, IdentityChange.DELETE): IdentityState.DELETED,
    (IdentityState.DELETED, IdentityChange.ENROLL): IdentityState.PENDING,
}

COMMANDS: Final = (
    IdentityChange.RESUME,
    IdentityChange.REVOKE,
    IdentityChange.DELETE,
    IdentityChange.ENROLL,
    IdentityChange.SUSPEND,
)
"""The changes that an operator can make, in the order in which they are advised."""

LIMITED_BY_CERTIFICATE: Final = (IdentityState.ACTIVE, IdentityState.SUSPENDED)


def state_at(stored: str, not_after: float, now: float) -> IdentityState:
    """Return the state at `now` (seconds since 1970) with a certificate until `not_after`."""
    state = IdentityState(stored)
    if state in LIMITED_BY_CERTIFICATE and not_after <= now:
        return IdentityState.EXPIRED
    return state


def next_state(name: str, state: IdentityState, change: IdentityChange) -> IdentityState:
    """Return the state that follows.

    Raises:
        StateError: `change` is not legal for an identity in `state`.
    """
    try:
        return LEGAL[state, change]
    except KeyError:
        raise StateError(
            f"cannot {change} {name!r}, which is {state}; {_next_step(name, state, change)}"
        ) from None


def _next_step(name: str, state: IdentityState, change: IdentityChange) -> str:
    """Return the command that makes `change` legal; if there is none, those that are legal."""
    commands = [each for each in COMMANDS if (state, each) in LEGAL]
    for command in commands:
        if (LEGAL[state, command], change) in LEGAL:
            return f"first give 'fleet {command} {name}'"
    legal = ", ".join(f"'fleet {command} {name}'" for command in commands)
    return f"possible now: {legal}"
