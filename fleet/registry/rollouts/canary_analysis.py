"""Canary analysis: plain functions that decide whether a bundle's answers are worse than the
answers of earlier bundles.

A share that is measured on few answers may differ by chance. So a bundle is *worse* when a
one-sided confidence bound lies beyond the limit. For one share, the bound comes from Wilson's score
interval (Wilson 1927). For the difference of two shares, it comes from Newcombe's combination of
their two Wilson intervals (Newcombe 1998, method 10). With `SETTLED_FACTOR` times `min_answers`
observations, the measured value itself decides.

The tokens of one answer depend on each other, so each answer is one observation. If the cloud has
judged only a part of the tokens, the same part of the answers counts: answers x judged tokens / all
tokens.

An evaluation that is repeated often enough finds a difference by chance. The bound is therefore
`INTERIM_Z` standard deviations away until the end of the observation, and `FINAL_Z` at its end
(Haybittle 1971, Peto 1976).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from itertools import chain
from typing import Annotated, Final, NamedTuple

from msgspec import Meta, Struct

from fleet.protocol.types import Share
from fleet.registry.stats.aggregate import quantile_ms
from fleet.registry.stats.rollup_columns import BUCKETS_MS, TPOT

INTERIM_Z: Final = 3.0
FINAL_Z: Final = 1.645  # 95%, one-sided
SETTLED_FACTOR: Final = 10
"""With this many times `min_answers` observations, a value beyond its limit means *worse*, whatever
the bound is."""

MIN_OBSERVATIONS: Final = 5.0
"""The minimum number of observations of the new bundle before offload, agreement and times are
evaluated. A sample may have fewer observations than answers."""

QUANTILES: Final = (0.5, 0.95)


class CanaryLimits(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The amounts by which a bundle may be worse than before.

    `max_error_rate` is a share of the answers; where the share was higher before, the old one is
    the limit. No limit is evaluated before there are `min_answers`.
    """

    max_offload_increase: Share = 0.1
    max_agreement_drop: Share = 0.05
    max_error_rate: Share = 0.05
    max_tpot_ratio: Annotated[float, Meta(gt=0, le=1000)] = 1.5
    min_answers: Annotated[int, Meta(ge=1, le=1_000_000)] = 20


class Outcome(StrEnum):
    """The outcome of one limit; `unsure` is a value beyond its limit that may be chance."""

    FINE = "fine"
    UNSURE = "unsure"
    WORSE = "worse"


class Finding(NamedTuple):
    """The outcome of one limit, with its figures."""

    outcome: Outcome
    text: str


class ShareSample(NamedTuple):
    """A share of `n` observations."""

    share: float
    n: float


class Evidence(NamedTuple):
    """The sums over three sets of answers, by the columns of a roll-up (errors, tokens, ...).

    `new`: answers of the new bundle. `same`: answers of the same devices with other bundles.
    `others`: answers of the other devices with other bundles.
    """

    new: Counter[str]
    same: Counter[str]
    others: Counter[str]

    @property
    def num_answers(self) -> int:
        """The number of answers of the new bundle."""
        return self.new["answers"]


def wilson(sample: ShareSample, z: float) -> tuple[float, float]:
    """Return Wilson's lower and upper bound of the true share, at `z` standard deviations.

    Without observations they are (0, 1).
    """
    p, n = sample
    if not n:
        return 0.0, 1.0
    weight = z * z / n
    centre = p + weight / 2
    half = z * math.sqrt((p * (1 - p) + weight / 4) / n)
    low = (centre - half) / (1 + weight)
    high = (centre + half) / (1 + weight)
    return max(0.0, low), min(1.0, high)


def increase_bound(new: ShareSample, old: ShareSample, z: float) -> float:
    """Return the lower bound of the increase from `old` to `new`."""
    low, _ = wilson(new, z)
    _, high = wilson(old, z)
    below = new.share - low
    above = high - old.share
    return new.share - old.share - math.hypot(below, above)


def examine_modes(
    evidence: Mapping[str, Evidence], limits: CanaryLimits, *, is_final: bool
) -> list[Finding]:
    """Return the findings for all modes. With several modes, each text begins with the mode's name.

    Offload and times differ between modes more than between bundles, so the answers of one mode are
    compared with those of the same mode.
    """
    findings = {mode: examine(each, limits, is_final=is_final) for mode, each in evidence.items()}
    if len(evidence) == 1:
        return [*chain.from_iterable(findings.values())]
    return [
        Finding(finding.outcome, f"{mode}: {finding.text}")
        for mode, each in findings.items()
        for finding in each
    ]


def examine(evidence: Evidence, limits: CanaryLimits, *, is_final: bool) -> list[Finding]:
    """Return the finding for each limit; nothing before there are enough answers.

    The old sample comes from the same devices. If they have too few answers, it comes from the
    other devices. Without a large enough old sample, only the limit of errors is evaluated.
    """
    if evidence.num_answers < limits.min_answers:
        return []
    z = FINAL_Z if is_final else INTERIM_Z
    checks = (_offload, _agreement, _errors, _times)
    return [finding for check in checks for finding in check(evidence, limits, z)]


def _offload(evidence: Evidence, limits: CanaryLimits, z: float) -> Iterator[Finding]:
    new = _share(evidence.new, "cloud_tokens", "tokens")
    old = _old(evidence, "cloud_tokens", "tokens", limits)
    limit = limits.max_offload_increase
    if min(new.n, old.n) >= MIN_OBSERVATIONS:
        text = f"offload {new.share:.1%}, before {old.share:.1%}, limit {limit:.1%} more"
        increase = ShareSample(new.share - old.share, new.n)
        yield _finding(text, increase, increase_bound(new, old, z), limit, limits)


def _agreement(evidence: Evidence, limits: CanaryLimits, z: float) -> Iterator[Finding]:
    new = _share(evidence.new, "agreed", "judged")
    old = _old(evidence, "agreed", "judged", limits)
    limit = limits.max_agreement_drop
    if min(new.n, old.n) >= MIN_OBSERVATIONS:
        text = f"agreement {new.share:.1%}, before {old.share:.1%}, limit {limit:.1%} less"
        new_misses = ShareSample(1 - new.share, new.n)
        old_misses = ShareSample(1 - old.share, old.n)
        drop = ShareSample(old.share - new.share, new.n)
        yield _finding(text, drop, increase_bound(new_misses, old_misses, z), limit, limits)


def _errors(evidence: Evidence, limits: CanaryLimits, z: float) -> Iterator[Finding]:
    new = _share(evidence.new, "errors", "answers")
    old = _old(evidence, "errors", "answers", limits)
    limit = max(limits.max_error_rate, old.share)
    bound, _ = wilson(new, z)
    text = f"errors {new.share:.1%}, limit {limit:.1%}"
    yield _finding(text, new, bound, limit, limits)


def _times(evidence: Evidence, limits: CanaryLimits, z: float) -> Iterator[Finding]:
    """Evaluate the quantiles of the time per token.

    The quantile q is above its limit when more than the share 1 - q of the new answers took longer
    a token than `max_tpot_ratio` times the old quantile. For the lower bound of this share, the old
    quantile is replaced by its own upper bound.
    """
    new = _histogram(evidence.new)
    baselines = (_histogram(evidence.same), _histogram(evidence.others))
    old = next((each for each in baselines if sum(each) >= limits.min_answers), None)
    if old is None or sum(new) < MIN_OBSERVATIONS:
        return
    ratio = limits.max_tpot_ratio
    for q in QUANTILES:
        _, high = wilson(ShareSample(q, sum(old)), z)
        new_ms = _quantile_ms(new, q)
        old_ms = _quantile_ms(old, q)
        max_old_ms = _quantile_ms(old, high)
        slow = ShareSample(share_above(new, old_ms * ratio), sum(new))
        surely_slow = ShareSample(share_above(new, max_old_ms * ratio), sum(new))
        bound, _ = wilson(surely_slow, z)
        times = f"{new_ms:.0f} ms a token, before {old_ms:.0f}, limit {ratio:g} times"
        yield _finding(f"p{q * 100:.0f} {times}", slow, bound, 1 - q, limits)


def _quantile_ms(counts: Sequence[int], q: float) -> float:
    """Return the quantile of a histogram that is not empty."""
    ms = quantile_ms(counts, q)
    assert ms is not None
    return ms


def share_above(counts: Sequence[int], ms: float) -> float:
    """Return the share of a histogram's counts above `ms`, interpolated in the bucket of `ms`.

    It is 0 for an empty histogram.
    """
    total = sum(counts)
    if not total:
        return 0.0
    above = 0.0
    low = 0.0
    for high, count in zip((*BUCKETS_MS, math.inf), counts, strict=True):
        if low >= ms:
            above += count
        elif ms < high < math.inf:
            above += count * (high - ms) / (high - low)
        low = high
    return above / total


def _finding(
    text: str, value: ShareSample, bound: float, limit: float, limits: CanaryLimits
) -> Finding:
    """Return the finding for `value`, which should be at most `limit`.

    `bound` is the lower confidence bound of `value`.
    """
    is_settled = value.n >= SETTLED_FACTOR * limits.min_answers
    is_above = value.share > limit
    if bound > limit or (is_settled and is_above):
        return Finding(Outcome.WORSE, text)
    return Finding(Outcome.UNSURE if is_above else Outcome.FINE, text)


def _old(evidence: Evidence, part: str, whole: str, limits: CanaryLimits) -> ShareSample:
    """Return the sample of the same devices if it is large enough, else the larger one."""
    same = _share(evidence.same, part, whole)
    others = _share(evidence.others, part, whole)
    return same if same.n >= min(limits.min_answers, others.n) else others


def _share(counts: Counter[str], part: str, whole: str) -> ShareSample:
    """Return `part` / `whole` as a share of the answers or of some of their tokens.

    The number of observations is that of the answers, reduced by the fraction of all tokens that
    `whole` counts.
    """
    amount = counts[whole]
    total = counts["answers" if whole == "answers" else "tokens"]
    if not amount or not total:
        return ShareSample(0.0, 0.0)
    n = counts["answers"] * min(1.0, amount / total)
    return ShareSample(min(1.0, counts[part] / amount), n)


def _histogram(counts: Counter[str]) -> list[int]:
    return [counts[name] for name in TPOT]
