"""The sums, histograms and mode switches of reports, as a value."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from fleet.protocol.counts import COUNT_FIELDS, NO_COUNTS, GenerationCounts
from fleet.protocol.report import GenerationReport
from fleet.registry.stats.rollup_columns import AMOUNTS, BUCKETS_MS, NUM_BUCKETS, SUMMED, TPOT, TTFT

MAX_AMOUNT: Final = 1 << 40
"""The largest amount of one report that counts, so that no device can make the sums overflow."""

MAX_ANSWERS: Final = 1 << 20

MAX_REASON_LENGTH: Final = 120
MAX_MODE_LENGTH: Final = 63
ENDS_MS: Final = np.array([0.0, *BUCKETS_MS, BUCKETS_MS[-1]])
"""The ends of the buckets; the last bucket, which has no upper end, is a point."""

NUMBER: Final = re.compile(r"\d+(\.\d+)?")


def _empty_histogram() -> list[int]:
    return [0] * NUM_BUCKETS


@dataclass(kw_only=True)
class ReportAggregate:
    """The sum of reports: their counts, histograms of times, and switches by mode and reason."""

    counts: GenerationCounts = NO_COUNTS
    num_answers: int = 0
    num_errors: int = 0
    ttft: list[int] = field(default_factory=_empty_histogram)
    tpot: list[int] = field(default_factory=_empty_histogram)
    switches: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, report: GenerationReport) -> None:
        """Add a report; the times of one with several answers count for all of them."""
        answers = min(report.answers, MAX_ANSWERS)
        counts = report.limited(MAX_AMOUNT)
        self.counts = self.counts.merge(counts)
        self.num_answers += answers
        if report.finish_reason == "error":
            self.num_errors += answers
        if counts.tokens:
            self.ttft[bucket(report.ttft_ms)] += answers
        if counts.tokens > answers:
            self.tpot[bucket(report.tpot_ms)] += answers
        self.switches.update(
            (switch.mode[:MAX_MODE_LENGTH], kind_of(switch.reason)) for switch in report.switches
        )

    def columns(self) -> dict[str, int]:
        """Return the aggregate by the columns of a roll-up."""
        return {
            "answers": self.num_answers,
            "errors": self.num_errors,
            **{name: self.counts.sources.get(source, 0) for source, name in SUMMED.items()},
            **{name: getattr(self.counts, name) for name in COUNT_FIELDS},
            **dict(zip(TTFT, self.ttft, strict=True)),
            **dict(zip(TPOT, self.tpot, strict=True)),
        }


def from_columns(values: Sequence[int], sources: Mapping[str, int]) -> ReportAggregate:
    """Return the aggregate of a roll-up's values, in the order of its columns.

    `sources` are the tokens of the sources that have no column.
    """
    amounts = dict(zip(AMOUNTS, values[: len(AMOUNTS)], strict=True))
    summed = {source: amounts[name] for source, name in SUMMED.items() if amounts[name]}
    histograms = values[len(AMOUNTS) :]
    return ReportAggregate(
        counts=GenerationCounts(
            sources={**sources, **summed}, **{name: amounts[name] for name in COUNT_FIELDS}
        ),
        num_answers=amounts["answers"],
        num_errors=amounts["errors"],
        ttft=list(histograms[:NUM_BUCKETS]),
        tpot=list(histograms[NUM_BUCKETS:]),
    )


def bucket(ms: float) -> int:
    """Return the bucket of a histogram that `ms` falls into."""
    return bisect_left(BUCKETS_MS, ms)


def kind_of(reason: str) -> str:
    """Return a switch's reason without its numbers, so that equal kinds add up.

    For example "the link is down", or "# ms a token ...".
    """
    return NUMBER.sub("#", reason)[:MAX_REASON_LENGTH]


def quantile_ms(counts: Sequence[int], q: float) -> float | None:
    """Return the `q`-quantile of a histogram with `NUM_BUCKETS` counts, 0 < q <= 1.

    None when it is empty.
    """
    return quantiles_ms([counts], (q,))[0][0]


def quantiles_ms(
    histograms: Sequence[Sequence[int]], qs: Iterable[float]
) -> list[list[float | None]]:
    """Return for each of `qs` the quantile of every histogram.

    It is linear within its bucket, whose ends are a factor of 1.41 apart; above the last end it is
    that end.
    """
    if not histograms:
        return [[] for _ in qs]
    counts = np.array(histograms, np.int64)
    below = counts.cumsum(1)
    row = np.arange(len(counts))
    total = below[:, -1]
    quantiles = []
    for q in qs:
        rank = q * total
        index = (below < rank[:, None]).sum(1)
        inside = counts[row, index]
        share = (rank - below[row, index] + inside) / np.maximum(inside, 1)
        ms = ENDS_MS[index] + (ENDS_MS[index + 1] - ENDS_MS[index]) * share
        pairs = zip(ms.tolist(), total.tolist(), strict=True)
        quantiles.append([value if number else None for value, number in pairs])
    return quantiles
