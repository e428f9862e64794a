"""The decision to draft one more token, before a verify request and while it is pending."""

from __future__ import annotations

from typing import Final

WORTH: Final = 1.9  # steps
MIN_SURVIVAL: Final = 0.1


def worth_drafting(survival: float, step_s: float, round_trip_s: float) -> bool:
    """Return whether to draft one more token before the verify request.

    `survival` is the probability that all drafts so far are accepted, and so the expected number of
    tokens that one more draft gains. By the marginal value theorem (Charnov 1976,
    doi:10.1016/0040-5809(76)90040-X) a draft is worth its step if it gains tokens at a higher rate
    than the average. As drafting continues during the round trip, an average token takes about two
    fifths of the time of a step and a round trip (ADR 0028). `WORTH` is a little below the inverse
    of this, because a round trip also costs the worker time and the link bytes (ADR 0052).
    """
    return survival * (step_s + round_trip_s) > WORTH * step_s


def worth_guessing(survival: float, step_s: float, wait_s: float) -> bool:
    """Return whether to draft another token while the verdict on the pending drafts is expected in
    `wait_s` seconds.

    With probability `survival` the drafts are accepted. The step then saves the part of its time
    that lies within the wait. Otherwise it delays the device by the part beyond the wait.
    """
    saved = survival * min(step_s, wait_s)
    lost = (1 - survival) * max(0.0, step_s - wait_s)
    return survival >= MIN_SURVIVAL and saved >= lost
