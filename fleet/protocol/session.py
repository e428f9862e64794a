"""Session rules of both ends: the new rows of a chunk, and the legal order of events."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from fleet.errors import OutOfOrderError


def new_rows(received: int, start: int, count: int) -> int | None:
    """Return how many rows of a chunk [start, start + count) are new to a receiver of [0,
    received).

    0 is a duplicate; None is a gap: rows before `start` are missing and the chunk cannot be used.
    """
    if start > received:
        return None
    return max(0, start + count - received)


class LinkState(StrEnum):
    """The state of a session, as its device sees it."""

    IDLE = "idle"
    OPENING = "opening"
    OPEN = "open"
    LOST = "lost"
    CLOSED = "closed"


class LinkEvent(StrEnum):
    OPEN = "open"
    OPENED = "opened"
    REFUSED = "refused"
    TIMEOUT = "timeout"
    WORKER_GONE = "worker_gone"
    CLOSE = "close"


LEGAL: Final[dict[tuple[LinkState, LinkEvent], LinkState]] = {
    (LinkState.IDLE, LinkEvent.OPEN): LinkState.OPENING,
    (LinkState.IDLE, LinkEvent.CLOSE): LinkState.CLOSED,
    (LinkState.OPENING, LinkEvent.OPENED): LinkState.OPEN,
    (LinkState.OPENING, LinkEvent.REFUSED): LinkState.LOST,
    (LinkState.OPENING, LinkEvent.TIMEOUT): LinkState.LOST,
    (LinkState.OPENING, LinkEvent.CLOSE): LinkState.CLOSED,
    (LinkState.OPEN, LinkEvent.REFUSED): LinkState.LOST,
    (LinkState.OPEN, LinkEvent.TIMEOUT): LinkState.LOST,
    (LinkState.OPEN, LinkEvent.WORKER_GONE): LinkState.LOST,
    (LinkState.OPEN, LinkEvent.CLOSE): LinkState.CLOSED,
    (LinkState.LOST, LinkEvent.OPEN): LinkState.OPENING,
    (LinkState.LOST, LinkEvent.OPENED): LinkState.OPEN,
    (LinkState.LOST, LinkEvent.CLOSE): LinkState.CLOSED,
}


def advance(state: LinkState, event: LinkEvent) -> LinkState:
    """Return the state after `event`.

    Raises:
        OutOfOrderError: the event is not legal in `state`.
    """
    following = LEGAL.get((state, event))
    if following is None:
        legal = ", ".join(sorted(e for s, e in LEGAL if s is state)) or "nothing"
        raise OutOfOrderError(f"a session that is {state} expects {legal}; got {event}")
    return following
