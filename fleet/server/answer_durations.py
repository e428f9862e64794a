"""Histograms of answers' times, under the names and bounds that OpenTelemetry has for servers."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Final, NamedTuple

from fleet.protocol.report import GenerationReport

MS: Final = 1000.0
MAX_BUNDLES: Final = 50
"""The bundles that have histograms of their own; the answers of others are not counted."""


class TimesMetric(NamedTuple):
    """A metric of OpenTelemetry: its name, text, bounds in seconds, and value of a report."""

    name: str
    text: str
    bounds_s: tuple[float, ...]
    seconds_of: Callable[[GenerationReport], float | None]


def _request_s(report: GenerationReport) -> float | None:
    later_tokens = max(0.0, report.tokens / report.answers - 1)
    return (report.ttft_ms + report.tpot_ms * later_tokens) / MS


def _first_token_s(report: GenerationReport) -> float | None:
    return report.ttft_ms / MS if _is_success(report) and report.tokens else None


def _token_s(report: GenerationReport) -> float | None:
    has_more = _is_success(report) and report.tokens > report.answers
    return report.tpot_ms / MS if has_more else None


def _is_success(report: GenerationReport) -> bool:
    return report.finish_reason != "error"


TIMES_METRICS: Final = (
    TimesMetric(
        "gen_ai_server_request_duration_seconds",
        "Time from a request to the last token of its answer.",
        tuple(0.01 * 2**i for i in range(14)),
        _request_s,
    ),
    TimesMetric(
        "gen_ai_server_time_to_first_token_seconds",
        "Time from a request to the first token of an answer that succeeds.",
        (
            0.001,
            0.005,
            0.01,
            0.02,
            0.04,
            0.06,
            0.08,
            0.1,
            0.25,
            0.5,
            0.75,
            1.0,
            2.5,
            5.0,
            7.5,
            10.0,
        ),
        _first_token_s,
    ),
    TimesMetric(
        "gen_ai_server_time_per_output_token_seconds",
        "Time of each token after the first, of an answer that succeeds.",
        (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5),
        _token_s,
    ),
)


@dataclass
class TimesHistogram:
    """The number of values up to each bound of a metric, and their sum in seconds."""

    metric: TimesMetric
    counts: list[int] = field(init=False)
    sum_s: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.metric.bounds_s) + 1)

    def add(self, report: GenerationReport) -> None:
        """Count a report; the times of one with several answers are means, and count for each."""
        seconds = self.metric.seconds_of(report)
        if seconds is not None:
            self.counts[bisect_left(self.metric.bounds_s, seconds)] += report.answers
            self.sum_s += seconds * report.answers

    def buckets(self) -> list[tuple[str, float]]:
        """Return the cumulative counts by the texts of the bounds; the last one has no end."""
        bounds = [*map(repr, self.metric.bounds_s), "+Inf"]
        return list(zip(bounds, map(float, accumulate(self.counts)), strict=True))


class AnswerDurations:
    """The times of the answers whose reports this process stored, by bundle; for any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_bundle: dict[str, tuple[TimesHistogram, ...]] = {}

    def add(self, report: GenerationReport) -> None:
        """Count a report that was stored for the first time."""
        with self._lock:
            known = self._by_bundle
            if report.bundle_id not in known and len(known) < MAX_BUNDLES:
                known[report.bundle_id] = tuple(map(TimesHistogram, TIMES_METRICS))
            for each in known.get(report.bundle_id, ()):
                each.add(report)

    def read(self) -> dict[TimesMetric, dict[str, tuple[list[tuple[str, float]], float]]]:
        """Return buckets and sum of each metric by bundle, all of one moment."""
        with self._lock:
            return {
                metric: {
                    bundle_id: (histograms[i].buckets(), histograms[i].sum_s)
                    for bundle_id, histograms in self._by_bundle.items()
                }
                for i, metric in enumerate(TIMES_METRICS)
            }
