"""How far drafts are worth their time: a run that is sent to the cloud, or guesses while an answer is awaited."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import mul


def expected_tokens(chances: Sequence[float]) -> float:
    """Tokens that one verdict is expected to give for drafts that are accepted with these probabilities.

    Each draft counts with the probability that it and all before it are accepted; a rejection gives the cloud's own
    token in the place of the first wrong one.
    """
    survivals = list(accumulate(chances, mul))
    return sum(survivals) + 1 - survivals[-1] if survivals else 0.0


def worth_drafting(chances: Sequence[float], elapsed_s: float, step_s: float, round_trip_s: float) -> bool:
    """Whether one more draft raises the expected number of tokens a second.

    By the marginal value theorem (Charnov 1976, doi:10.1016/0040-5809(76)90040-X): go on while what the next draft
    brings in its time is more than what the whole round brings in all of its time. The next draft is taken to be as
    good as the last ones are on average.
    """
    survivals = list(accumulate(chances, mul))
    if not survivals:
        return True
    mean = survivals[-1] ** (1 / len(survivals))
    gain = expected_tokens([*chances, mean]) - expected_tokens(chances)
    return gain * (elapsed_s + round_trip_s) > expected_tokens(chances) * step_s


def worth_guessing(chance: float, step_s: float, wait_s: float) -> bool:
    """Whether a step behind a guess saves time on average, when the cloud's word is expected in `wait_s` seconds.

    A right guess, which it is with probability `chance`, saves of the step what lies within the wait; a wrong one keeps
    the device busy for what lies beyond it.
    """
    return chance * min(step_s, wait_s) >= (1 - chance) * max(0.0, step_s - wait_s)
