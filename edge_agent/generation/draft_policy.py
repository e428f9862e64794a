"""The number of drafts that is worth its time, before a verify request and while it is pending."""

from __future__ import annotations

from typing import Final

WORTH: Final = 2.5  # steps
MIN_SURVIVAL: Final = 0.1


def worth_drafting(survival: float, step_s: float, round_trip_s: float) -> bool:
    """Return whether to draft one more token before the verify request.

    `survival` is the probability that all drafts so far are accepted. By the marginal value theorem
    (Charnov 1976, doi:10.1016/0040-5809(76)90040-X) a draft is worth its step while its gain, a
    token with that probability, takes less time than a token takes on average. As drafting
    continues during the round trip, that is about two fifths of a step and a round trip (ADR 0028).
    """
    return survival * (step_s + round_trip_s) > WORTH * step_s


def worth_guessing(survival: float, step_s: float, wait_s: float) -> bool:
    """Return whether a step behind pending drafts saves time; their verdict is expected in `wait_s`
    seconds.

    With probability `survival` they are accepted, and the step saves its time within the wait;
    otherwise it keeps the device busy for its time beyond the wait.
    """
    saved = survival * min(step_s, wait_s)
    lost = (1 - survival) * max(0.0, step_s - wait_s)
    return survival >= MIN_SURVIVAL and saved >= lost
