"""The states of an identity, and their legal order as a table."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from fleet.errors import StateError


class IdentityState(StrEnum):
    """Where an identity stands. `expired` is never stored: an active one becomes that when its time is over."""

    PENDING = "pending"
    ACTIVE = "active"
    SUSPENDED = "suspended"
    REVOKED = "revoked"
    EXPIRED = "expired"


class IdentityChange(StrEnum):
    """What can happen to an identity."""

    ENROLL = "enroll"
    JOIN = "join"
    RENEW = "renew"
    SUSPEND = "suspend"
    RESUME = "resume"
    REVOKE = "revoke"


LEGAL: Final[dict[tuple[IdentityState, IdentityChange], IdentityState]] = {
    (IdentityState.PENDING, IdentityChange.ENROLL): IdentityState.PENDING,
    (IdentityState.PENDING, IdentityChange.JOIN): IdentityState.ACTIVE,
    (IdentityState.PENDING, IdentityChange.REVOKE): IdentityState.REVOKED,
    (
        IdentityState.ACTIVE,
        IdentityChange.JOIN,
    ): IdentityState.ACTIVE,  # the same key asks again: its reply was lost
    (IdentityState.ACTIVE, IdentityChange.RENEW): IdentityState.ACTIVE,
    (IdentityState.ACTIVE, IdentityChange.SUSPEND): IdentityState.SUSPENDED,
    (IdentityState.ACTIVE, IdentityChange.REVOKE): IdentityState.REVOKED,
    (IdentityState.SUSPENDED, IdentityChange.RESUME): IdentityState.ACTIVE,
    (IdentityState.SUSPENDED, IdentityChange.REVOKE): IdentityState.REVOKED,
    (IdentityState.EXPIRED, IdentityChange.ENROLL): IdentityState.PENDING,
    (IdentityState.EXPIRED, IdentityChange.REVOKE): IdentityState.REVOKED,
    (IdentityState.REVOKED, IdentityChange.ENROLL): IdentityState.PENDING,
    (IdentityState.REVOKED, IdentityChange.REVOKE): IdentityState.REVOKED,
}


def state_at(stored: str, not_after: float, now: float) -> IdentityState:
    """The state at `now` of an identity whose certificate ends at `not_after` (seconds since 1970)."""
    state = IdentityState(stored)
    return (
        IdentityState.EXPIRED
        if state in (IdentityState.ACTIVE, IdentityState.SUSPENDED) and not_after <= now
        else state
    )


def next_state(name: str, state: IdentityState, change: IdentityChange) -> IdentityState:
    """Raises StateError when `change` is not legal for an identity in `state`."""
    try:
        return LEGAL[state, change]
    except KeyError:
        legal = ", ".join(each for known, each in LEGAL if known is state)
        raise StateError(
            f"cannot {change} {name!r}, which is {state}: expected one of {legal}"
        ) from None
