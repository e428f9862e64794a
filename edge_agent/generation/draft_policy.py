"""How far drafts are worth their time: before the cloud is asked about them, and while its answer is awaited."""

from __future__ import annotations

from typing import Final

WORTH: Final = 2.5  # steps
MIN_SURVIVAL: Final = 0.1


def worth_drafting(survival: float, step_s: float, round_trip_s: float) -> bool:
    """Whether to draft one more token before asking, when all drafts so far are accepted with probability `survival`.

    By the marginal value theorem (Charnov 1976, doi:10.1016/0040-5809(76)90040-X) a draft is worth its step while what
    it brings, a token with that probability, takes less time than a token takes on average. As drafting goes on during
    the round trip, that is about two fifths of a step and a round trip (ADR 0028).
    """
    return survival * (step_s + round_trip_s) > WORTH * step_s


def worth_guessing(survival: float, step_s: float, wait_s: float) -> bool:
    """Whether a step behind drafts that the cloud is judging saves time, its word being expected in `wait_s` seconds.

    Where they are accepted, which they are with probability `survival`, it saves of the step what lies within the wait;
    where not, it keeps the device busy for what lies beyond it.
    """
    saved = survival * min(step_s, wait_s)
    lost = (1 - survival) * max(0.0, step_s - wait_s)
    return survival >= MIN_SURVIVAL and saved >= lost
