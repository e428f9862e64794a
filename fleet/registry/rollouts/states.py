"""The states of a roll-out, and their legal order as a table."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from fleet.errors import RolloutError


class RolloutState(StrEnum):
    """The state of a roll-out. While it is `waiting` no worker serves its bundle."""

    WAITING = "waiting"
    RUNNING = "running"
    PAUSED = "paused"
    COMPLETED = "completed"
    UNDONE = "undone"
    FAILED = "failed"


class RolloutEvent(StrEnum):
    """An event that changes a roll-out's state.

    `SERVE`: a worker serves its bundle. `MISS`: no worker serves it any more.
    """

    SERVE = "serve"
    MISS = "miss"
    PAUSE = "pause"
    RESUME = "resume"
    COMPLETE = "complete"
    UNDO = "undo"
    FAIL = "fail"


LEGAL_EVENTS: Final[dict[tuple[RolloutState, RolloutEvent], RolloutState]] = {
    (RolloutState.WAITING, RolloutEvent.SERVE): RolloutState.RUNNING,
    (RolloutState.WAITING, RolloutEvent.PAUSE): RolloutState.PAUSED,
    (RolloutState.WAITING, RolloutEvent.UNDO): RolloutState.UNDONE,
    (RolloutState.RUNNING, RolloutEvent.MISS): RolloutState.WAITING,
    (RolloutState.RUNNING, RolloutEvent.PAUSE): RolloutState.PAUSED,
    (RolloutState.RUNNING, RolloutEvent.COMPLETE): RolloutState.COMPLETED,
    (RolloutState.RUNNING, RolloutEvent.UNDO): RolloutState.UNDONE,
    (RolloutState.RUNNING, RolloutEvent.FAIL): RolloutState.FAILED,
    (RolloutState.PAUSED, RolloutEvent.RESUME): RolloutState.WAITING,
    (RolloutState.PAUSED, RolloutEvent.UNDO): RolloutState.UNDONE,
}

OPEN: Final = (RolloutState.WAITING, RolloutState.RUNNING, RolloutState.PAUSED)
"""The states of a roll-out that has not ended."""


def next_rollout_state(rollout: int, state: RolloutState, event: RolloutEvent) -> RolloutState:
    """Return the state that follows.

    Raises:
        RolloutError: `event` is not legal for a roll-out in `state`.
    """
    try:
        return LEGAL_EVENTS[state, event]
    except KeyError:
        legal = ", ".join(each for start, each in LEGAL_EVENTS if start is state)
        advice = (
            f"expected one of {legal}"
            if legal
            else "it has ended; start another one with 'fleet bundle rollout BUNDLE'"
        )
        raise RolloutError(
            f"cannot {event} roll-out {rollout}, which is {state}: {advice}"
        ) from None
