"""The spans that cover a window of time: plain functions of seconds since 1970."""

from __future__ import annotations

from itertools import pairwise
from typing import Final, NamedTuple

from fleet.protocol.types import DAY_S
from fleet.registry.stats.rollup_columns import HOUR_S, SPANS_S

EXACT_S: Final = DAY_S
"""A longer window begins with its whole hour: it is read from roll-ups alone."""

BY_HOUR_S: Final = 8 * DAY_S
"""A longer window begins with its whole day, in UTC: it needs a third fewer spans."""

MIN_POINTS: Final = 6


class Spans(NamedTuple):
    """The spans of one length from `first` on, and before `end` unless that is None."""

    span_s: int
    first: int
    end: int | None


def window_start(since: float, now: float) -> float:
    """Return the actual start of a window that was requested from `since` on."""
    if now - since <= EXACT_S:
        return since
    span_s = HOUR_S if now - since <= BY_HOUR_S else DAY_S
    return since // span_s * span_s


def ladder(since: float | None) -> list[Spans]:
    """Return the fewest spans that hold all whole hours from `since` on; None is from ever."""
    if since is None:
        return [Spans(SPANS_S[-1], 0, None)]
    steps = []
    first = rounded_up(since, HOUR_S)
    for span_s, longer_s in pairwise(SPANS_S):
        end = rounded_up(first, longer_s)
        if first < end:
            steps.append(Spans(span_s, first, end))
        first = end
    return [*steps, Spans(SPANS_S[-1], first, None)]


def rounded_up(at: float, span_s: int) -> int:
    """Return the first start of a span at `at` or later."""
    return -int(-at // span_s) * span_s


def trend_span_s(length_s: float) -> int:
    """Return the length of a trend's points: the longest span that fits six times."""
    for span_s in reversed(SPANS_S):
        if length_s >= MIN_POINTS * span_s:
            return span_s
    return HOUR_S
