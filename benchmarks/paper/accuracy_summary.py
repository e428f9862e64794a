"""Scores of each system on each data set, next to those of the deployed full model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Final

from msgspec import Struct

from benchmarks.paper.accuracy import FULL, SYSTEMS, TIE, VERIFIED
from benchmarks.paper.rows import Scored
from benchmarks.paper.scores import Statistic, auc, interval, majority, mean, perplexity
from benchmarks.paper.tasks import TASKS
from fleet.protocol.modes import offload_rate

PERPLEXITY: Final = "perplexity"  # the metric where nothing is right or wrong


class Accuracy(Struct, frozen=True, kw_only=True):
    """One system on one data set, over `num` samples.

    `value` is that of `metric` and [`low`, `high`] its bootstrap interval of 95%; `is_within_full`
    is true if it lies in the interval of the full model on the same samples. `details` are means of
    all metrics by name, for two choices with `majority`, the accuracy of always giving the more
    common one, and `auc`. `perplexity` is the full model's of the answers, `agreement` the share of
    their tokens that it would have chosen, `identical` the share of answers that are its own, token
    for token, None without these.
    """

    dataset: str
    system: str
    metric: str
    value: float
    low: float
    high: float
    num: int
    details: dict[str, float]
    perplexity: float
    agreement: float
    offload_rate: float
    identical: float | None = None
    is_within_full: bool | None = None


class Difference(Struct, frozen=True, kw_only=True):
    """A verified answer that is not the full model's own, and the gap of logits where they part.

    A tie excuses it.
    """

    dataset: str
    sample: int
    gap: float
    is_tie: bool


def summary(scored: Iterable[Scored]) -> list[Accuracy]:
    """Return a row for each data set and system with answers, in the order of the tables."""
    answers: dict[tuple[str, str], dict[int, Scored]] = {}
    for row in scored:
        answers.setdefault((row.dataset, row.system), {})[row.sample] = row
    rows = []
    for dataset in TASKS:
        full = answers.get((dataset, FULL), {})
        for system in SYSTEMS:
            if scores := answers.get((dataset, system)):
                rows.append(_row(list(scores.values()), full))
    return rows


def verified_differences(scored: Iterable[Scored]) -> list[Difference]:
    """Return the verified answers that differ from those of `full`."""
    rows = list(scored)
    full = {(row.dataset, row.sample): row.token_ids for row in rows if row.system == FULL}
    return [
        Difference(dataset=row.dataset, sample=row.sample, gap=gap, is_tie=gap <= TIE)
        for row in rows
        if row.system == VERIFIED
        and row.token_ids != full.get((row.dataset, row.sample), row.token_ids)
        for gap in [row.gap or 0.0]
    ]


def _row(scores: list[Scored], full: dict[int, Scored]) -> Accuracy:
    pairs = [(row, full[row.sample]) for row in scores if row.sample in full]
    metric, statistic = _metric(scores)
    low, high = interval(len(scores), statistic)
    value = _of_all(statistic, scores)
    within = None
    if pairs:
        ours = [other for _, other in pairs]
        lowest, highest = interval(len(ours), _metric(ours)[1])
        within = lowest <= value <= highest
    sources: Counter[str] = Counter()
    for row in scores:
        sources.update(row.tokens_from)
    return Accuracy(
        dataset=scores[0].dataset,
        system=scores[0].system,
        metric=metric,
        value=value,
        low=low,
        high=high,
        num=len(scores),
        details=_details(scores),
        perplexity=_of_all(_perplexity(scores), scores),
        agreement=_weighted(scores),
        offload_rate=offload_rate(sources),
        identical=mean([row.token_ids == other.token_ids for row, other in pairs])
        if pairs
        else None,
        is_within_full=within,
    )


def _metric(rows: Sequence[Scored]) -> tuple[str, Statistic]:
    scores = [row.score for row in rows if row.score is not None]
    if len(scores) < len(rows):
        return PERPLEXITY, _perplexity(rows)
    return next(iter(rows[0].details)), lambda chosen: mean([scores[i] for i in chosen])


def _perplexity(rows: Sequence[Scored]) -> Statistic:
    nlls = [row.nll or 0.0 for row in rows]
    counts = [len(row.token_ids) for row in rows]
    return lambda chosen: perplexity([nlls[i] for i in chosen], [counts[i] for i in chosen])


def _of_all(statistic: Statistic, rows: Sequence[Scored]) -> float:
    value = statistic(range(len(rows)))
    return float("nan") if value is None else value


def _weighted(rows: Sequence[Scored]) -> float:
    """Return the share of all answers' tokens that agree."""
    return sum((row.agreement or 0.0) * len(row.token_ids) for row in rows) / sum(
        len(row.token_ids) for row in rows
    )


def _details(rows: Sequence[Scored]) -> dict[str, float]:
    details: dict[str, Any] = {
        name: mean([row.details[name] for row in rows]) for name in rows[0].details
    }
    labels = [row.label for row in rows if row.label is not None]
    preferences = [row.preference for row in rows if row.preference is not None]
    if labels and len(labels) == len(preferences):
        details["majority"] = majority(labels)
        if (area := auc(preferences, labels)) is not None:
            details["auc"] = area
            details["auc_low"], details["auc_high"] = interval(
                len(labels),
                lambda chosen: auc([preferences[i] for i in chosen], [labels[i] for i in chosen]),
            )
    return details
