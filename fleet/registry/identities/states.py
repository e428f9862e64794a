"""The states of an identity, and their legal order as a table."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from fleet.errors import StateError


class State(StrEnum):
    """Where an identity stands. `expired` is never stored: an active one becomes that when its time is over."""

    PENDING = "pending"
    ACTIVE = "active"
    SUSPENDED = "suspended"
    REVOKED = "revoked"
    EXPIRED = "expired"


class Change(StrEnum):
    """What can happen to an identity."""

    ENROLL = "enroll"
    JOIN = "join"
    RENEW = "renew"
    SUSPEND = "suspend"
    RESUME = "resume"
    REVOKE = "revoke"


LEGAL: Final[dict[tuple[State, Change], State]] = {
    (State.PENDING, Change.ENROLL): State.PENDING,
    (State.PENDING, Change.JOIN): State.ACTIVE,
    (State.PENDING, Change.REVOKE): State.REVOKED,
    (State.ACTIVE, Change.JOIN): State.ACTIVE,  # the same key asks again: its reply was lost
    (State.ACTIVE, Change.RENEW): State.ACTIVE,
    (State.ACTIVE, Change.SUSPEND): State.SUSPENDED,
    (State.ACTIVE, Change.REVOKE): State.REVOKED,
    (State.SUSPENDED, Change.RESUME): State.ACTIVE,
    (State.SUSPENDED, Change.REVOKE): State.REVOKED,
    (State.EXPIRED, Change.ENROLL): State.PENDING,
    (State.EXPIRED, Change.REVOKE): State.REVOKED,
    (State.REVOKED, Change.ENROLL): State.PENDING,
    (State.REVOKED, Change.REVOKE): State.REVOKED,
}


def state_at(stored: str, not_after: float, now: float) -> State:
    """The state at `now` of an identity whose certificate ends at `not_after` (seconds since 1970)."""
    state = State(stored)
    return State.EXPIRED if state in (State.ACTIVE, State.SUSPENDED) and not_after <= now else state


def next_state(name: str, state: State, change: Change) -> State:
    """Raises StateError when `change` is not legal for an identity in `state`."""
    try:
        return LEGAL[state, change]
    except KeyError:
        legal = ", ".join(each for known, each in LEGAL if known is state)
        raise StateError(f"cannot {change} {name!r}, which is {state}: expected one of {legal}") from None
