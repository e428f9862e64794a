"""What answers add up to: the sums, histograms and switches of reports, as a value."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from fleet.protocol.modes import CLOUD, FALLBACK
from fleet.protocol.report import GenerationReport
from fleet.registry.stats.rollup_tables import BUCKETS_MS, TPOT, TTFT

MAX_AMOUNT: Final = 1 << 40
"""More than any answer has; a larger figure counts as this, so that no device can make the sums overflow."""

MAX_ANSWERS: Final = 1 << 20

MAX_REASON: Final = 120
ENDS_MS: Final = np.array([0.0, *BUCKETS_MS, BUCKETS_MS[-1]])
"""Between which the buckets lie; the last one, which has no end, is a point."""

FIGURE: Final = re.compile(r"\d+(\.\d+)?")


@dataclass
class Tally:
    """`counts` are by a roll-up's column, `sources` tokens by source, `switches` by mode and kind of reason."""

    counts: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    switches: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, report: GenerationReport) -> None:
        """Counts a report; one that stands for several answers puts all their times where its own are."""
        answers = min(report.answers, MAX_ANSWERS)
        tokens = limited(report.tokens)
        self.counts.update(
            answers=answers,
            errors=answers if report.finish_reason == "error" else 0,
            prompt_tokens=limited(report.prompt_tokens),
            tokens=tokens,
            cloud_tokens=limited(report.sources.get(CLOUD, 0)),
            fallback_tokens=limited(report.sources.get(FALLBACK, 0)),
            assists=limited(report.assists),
            verifies=limited(report.verifies),
            drafted=limited(report.drafted),
            bytes_up=limited(report.bytes_up),
            bytes_down=limited(report.bytes_down),
            judged=limited(report.judged),
            agreed=limited(report.agreed),
        )
        if tokens:
            self.counts[TTFT[bucket(report.ttft_ms)]] += answers
        if tokens > answers:
            self.counts[TPOT[bucket(report.tpot_ms)]] += answers
        self.sources.update(
            {source: limited(count) for source, count in report.sources.items() if count}
        )
        self.switches.update(
            (switch.mode[:63], kind_of(switch.reason)) for switch in report.switches
        )


def limited(amount: int) -> int:
    return min(amount, MAX_AMOUNT)


def bucket(ms: float) -> int:
    """The bucket of a histogram that `ms` falls into."""
    return bisect_left(BUCKETS_MS, ms)


def kind_of(reason: str) -> str:
    """A switch's reason without its figures, so that equal ones add up: "the link is down", "# ms a token ..."."""
    return FIGURE.sub("#", reason)[:MAX_REASON]


def quantile_ms(counts: Sequence[int], q: float) -> float | None:
    """The `q`-quantile of a histogram with `NUM_BUCKETS` counts, 0 < q <= 1; None when it is empty."""
    return quantiles_ms([counts], (q,))[0][0]


def quantiles_ms(
    histograms: Sequence[Sequence[int]], qs: Sequence[float]
) -> list[list[float | None]]:
    """For each of `qs` the quantile of every histogram.

    Linear within its bucket, whose ends are a factor of 1.41 apart; above the last end it is that end.
    """
    if not len(histograms):
        return [[] for _ in qs]
    counts = np.array(histograms, np.int64)
    below = counts.cumsum(1)
    row = np.arange(len(counts))
    total = below[:, -1]
    quantiles = []
    for q in qs:
        rank = q * total
        bucket = (below < rank[:, None]).sum(1)
        inside = counts[row, bucket]
        share = (rank - below[row, bucket] + inside) / np.maximum(inside, 1)
        ms = ENDS_MS[bucket] + (ENDS_MS[bucket + 1] - ENDS_MS[bucket]) * share
        quantiles.append(
            [
                value if number else None
                for value, number in zip(ms.tolist(), total.tolist(), strict=True)
            ]
        )
    return quantiles
