"""Which spans cover a window of time: plain functions of seconds since 1970."""

from __future__ import annotations

from itertools import pairwise
from typing import Final, NamedTuple

from fleet.registry.stats.rollup_tables import DAY_S, HOUR_S, SPANS_S

EXACT_S: Final = DAY_S
"""A window that began longer ago begins with its whole hour: it is read from roll-ups alone."""

BY_HOUR_S: Final = 8 * DAY_S
"""One that began longer ago than this begins with its whole day, in UTC: it needs a third fewer of them."""

MIN_POINTS: Final = 6


class Spans(NamedTuple):
    """The spans of one length that start at `first` or later, and before `end` unless that is None."""

    span_s: int
    first: int
    end: int | None


def beginning(since: float, now: float) -> float:
    """Where a window really begins that was asked for from `since` on."""
    if now - since <= EXACT_S:
        return since
    span_s = HOUR_S if now - since <= BY_HOUR_S else DAY_S
    return since // span_s * span_s


def ladder(since: float | None) -> list[Spans]:
    """The fewest spans that hold all which started in a whole hour at `since` or later; None is ever."""
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
    """The first start of a span at `at` or later."""
    return -int(-at // span_s) * span_s


def trend_span_s(length_s: float) -> int:
    """The length of a trend's points: the longest span that a window has at least six of."""
    return next((span_s for span_s in reversed(SPANS_S) if length_s >= MIN_POINTS * span_s), HOUR_S)
