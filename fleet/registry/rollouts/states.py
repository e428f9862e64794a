"""The states of a roll-out, and their legal order as a table."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from fleet.errors import RolloutError


class RolloutState(StrEnum):
    """Where a roll-out stands. One that is `waiting` has no worker that serves its bundle."""

    WAITING = "waiting"
    RUNNING = "running"
    PAUSED = "paused"
    COMPLETED = "completed"
    UNDONE = "undone"
    FAILED = "failed"


class RolloutEvent(StrEnum):
    """What can happen to a roll-out."""

    SERVE = "serve"
    MISS = "miss"
    PAUSE = "pause"
    RESUME = "resume"
    COMPLETE = "complete"
    UNDO = "undo"
    FAIL = "fail"


LEGAL: Final[dict[tuple[RolloutState, RolloutEvent], RolloutState]] = {
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


def next_state(rollout: int, state: RolloutState, event: RolloutEvent) -> RolloutState:
    """Raises RolloutError when `event` is not legal for a roll-out in `state`."""
    try:
        return LEGAL[state, event]
    except KeyError:
        legal = (
            ", ".join(each for known, each in LEGAL if known is state) or "nothing: it has ended"
        )
        raise RolloutError(
            f"cannot {event} roll-out {rollout}, which is {state}: expected one of {legal}"
        ) from None
