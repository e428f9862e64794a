"""Whether a bundle's answers are worse than those before it: plain functions of what was counted.

A share of few answers is not the bundle's. So a bundle is *worse* only where a one-sided confidence bound lies beyond
the limit: Wilson's score interval for one share (Wilson 1927), Newcombe's hybrid of two of them for the difference of
two (Newcombe 1998, method 10). Tokens of one answer depend on each other, so it is answers that count as the number of
observations; judged tokens are as many as the answers that they would fill. Who looks often sees chance alone: until
the end of the observation the bound is that of `LOOK_Z` standard deviations, and then that of `FINAL_Z` (Haybittle
1971, Peto 1976).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from enum import StrEnum
from typing import Annotated, Final, NamedTuple

from msgspec import Meta, Struct

from fleet.protocol.prompt import Share
from fleet.registry.stats.aggregate import quantile_ms
from fleet.registry.stats.rollup_tables import BUCKETS_MS, NUM_BUCKETS, TPOT

LOOK_Z: Final = 3.0
FINAL_Z: Final = 1.645  # 95%, one-sided
SETTLED: Final = 10
"""With so many times the least number of observations, a value beyond its limit decides even if it might be chance."""

LEAST: Final = 5.0
"""A limit is not looked at with fewer observations, of which there may be fewer than answers."""

QUANTILES: Final = (0.5, 0.95)


class CanaryLimits(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How much worse than before a bundle may be; nothing is judged before there are `min_answers`."""

    max_offload_increase: Share = 0.1
    max_agreement_drop: Share = 0.05
    max_error_rate: Share = 0.05
    max_tpot_ratio: Annotated[float, Meta(gt=0, le=1000)] = 1.5
    min_answers: Annotated[int, Meta(ge=1, le=1_000_000)] = 20


class Outcome(StrEnum):
    """`unsure` is a value beyond its limit that may be chance."""

    FINE = "fine"
    UNSURE = "unsure"
    WORSE = "worse"


class Finding(NamedTuple):
    outcome: Outcome
    text: str


class ShareSample(NamedTuple):
    """A share of `n` observations."""

    share: float
    n: float


class Evidence(NamedTuple):
    """Answers of the new bundle; of the same devices with others; and of the other devices with others.

    Each is counted by the columns of a roll-up.
    """

    new: Counter[str]
    same: Counter[str]
    others: Counter[str]

    @property
    def num_answers(self) -> int:
        return self.new["answers"]


def wilson(counted: ShareSample, z: float) -> tuple[float, float]:
    """Bounds of the share that is behind a counted one, `z` standard deviations away; (0, 1) of nothing."""
    p, n = counted
    if not n:
        return 0.0, 1.0
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def increase_bound(new: ShareSample, old: ShareSample, z: float) -> float:
    """The least by which `new` is likely to be above `old`."""
    below = new.share - wilson(new, z)[0]
    above = wilson(old, z)[1] - old.share
    return new.share - old.share - math.hypot(below, above)


def examine(evidence: Evidence, limits: CanaryLimits, *, is_final: bool) -> list[Finding]:
    """What the answers say of each limit; nothing before there are enough of them.

    The old is what the same devices did before, or where that is too little what the others do; a limit for which
    there is nothing old is not looked at.
    """
    if evidence.num_answers < limits.min_answers:
        return []
    z = FINAL_Z if is_final else LOOK_Z
    looks = (_offload, _agreement, _errors, _times)
    return [finding for look in looks for finding in look(evidence, limits, z)]


def _offload(evidence: Evidence, limits: CanaryLimits, z: float) -> Iterator[Finding]:
    new = _share(evidence.new, "cloud_tokens", "tokens")
    limit = limits.max_offload_increase
    old = _old(evidence, "cloud_tokens", "tokens", limits)
    if min(new.n, old.n) >= LEAST:
        text = f"offload {new.share:.1%}, before {old.share:.1%}, limit {limit:.1%} more"
        yield _finding(
            text,
            ShareSample(new.share - old.share, new.n),
            increase_bound(new, old, z),
            limit,
            limits,
        )


def _agreement(evidence: Evidence, limits: CanaryLimits, z: float) -> Iterator[Finding]:
    new = _share(evidence.new, "agreed", "judged")
    limit = limits.max_agreement_drop
    old = _old(evidence, "agreed", "judged", limits)
    if min(new.n, old.n) >= LEAST:
        text = f"agreement {new.share:.1%}, before {old.share:.1%}, limit {limit:.1%} less"
        bound = increase_bound(
            ShareSample(1 - new.share, new.n), ShareSample(1 - old.share, old.n), z
        )
        yield _finding(text, ShareSample(old.share - new.share, new.n), bound, limit, limits)


def _errors(evidence: Evidence, limits: CanaryLimits, z: float) -> Iterator[Finding]:
    new = _share(evidence.new, "errors", "answers")
    old = _old(evidence, "errors", "answers", limits)
    limit = max(limits.max_error_rate, old.share)
    yield _finding(
        f"errors {new.share:.1%}, limit {limit:.1%}", new, wilson(new, z)[0], limit, limits
    )


def _times(evidence: Evidence, limits: CanaryLimits, z: float) -> Iterator[Finding]:
    """A quantile is above its limit when more answers than its share allows took longer than that.

    The bound takes the old quantile where it may be at the most.
    """
    times = _histogram(evidence.new)
    candidates = (_histogram(evidence.same), _histogram(evidence.others))
    before = next((each for each in candidates if sum(each) >= limits.min_answers), None)
    if before is None or sum(times) < LEAST:
        return
    for q in QUANTILES:
        old_ms = _quantile_ms(before, q)
        new_ms = _quantile_ms(times, q)
        most_ms = _quantile_ms(before, wilson(ShareSample(q, sum(before)), z)[1])
        slow, surely = (
            ShareSample(share_above(times, ms * limits.max_tpot_ratio), sum(times))
            for ms in (old_ms, most_ms)
        )
        text = f"p{q * 100:.0f} {new_ms:.0f} ms a token, before {old_ms:.0f}, limit {limits.max_tpot_ratio:g} times"
        yield _finding(text, slow, wilson(surely, z)[0], 1 - q, limits)


def _quantile_ms(counts: Sequence[int], q: float) -> float:
    """Of a histogram that is not empty."""
    ms = quantile_ms(counts, q)
    assert ms is not None
    return ms


def share_above(counts: Sequence[int], ms: float) -> float:
    """The share of a histogram that is above `ms`, linear within its bucket; 0 of an empty one."""
    total = sum(counts)
    above = 0.0
    for i, count in enumerate(counts):
        low = BUCKETS_MS[i - 1] if i else 0.0
        high = BUCKETS_MS[i] if i < NUM_BUCKETS - 1 else math.inf
        if low >= ms:
            above += count
        elif high > ms and math.isfinite(high):
            above += count * (high - ms) / (high - low)
    return above / total if total else 0.0


def _finding(
    text: str, value: ShareSample, bound: float, limit: float, limits: CanaryLimits
) -> Finding:
    """`value` is that which must not be above `limit`, `bound` the least that it is likely to be."""
    settled = value.n >= SETTLED * limits.min_answers
    if bound > limit or (settled and value.share > limit):
        return Finding(Outcome.WORSE, text)
    return Finding(Outcome.UNSURE if value.share > limit else Outcome.FINE, text)


def _old(evidence: Evidence, part: str, whole: str, limits: CanaryLimits) -> ShareSample:
    """Of the same devices when they have enough, else of who has more."""
    same = _share(evidence.same, part, whole)
    others = _share(evidence.others, part, whole)
    return same if same.n >= min(limits.min_answers, others.n) else others


def _share(counts: Counter[str], part: str, whole: str) -> ShareSample:
    """A part of the answers, or of some of their tokens."""
    amount = counts[whole]
    all_ = counts["answers" if whole == "answers" else "tokens"]
    if not amount or not all_:
        return ShareSample(0.0, 0.0)
    return ShareSample(min(1.0, counts[part] / amount), counts["answers"] * min(1.0, amount / all_))


def _histogram(counts: Counter[str]) -> list[int]:
    return [counts[name] for name in TPOT]
