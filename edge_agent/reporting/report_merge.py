"""The sum of several reports, for a device that has no room for all of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

from msgspec.structs import asdict

from fleet.protocol.counts import NO_COUNTS
from fleet.protocol.report import GenerationReport

SEVERAL: Final = "several"
LABELS: Final = ("app", "request", "bundle_id", "mode", "finish_reason")


def merge_reports(reports: Sequence[GenerationReport], generation: str) -> GenerationReport:
    """Return the sum of reports of one bundle, as a report of `generation`.

    It stands for all their answers, from the first on. Times are means over answers. A label is
    `several` where the reports differ; session and worker are None.
    """
    counts = NO_COUNTS
    for report in reports:
        counts = counts.merge(report)
    labels: dict[str, Any] = {
        name: _common(getattr(each, name) for each in reports) for name in LABELS
    }
    answers = sum(report.answers for report in reports)
    return GenerationReport(
        generation=generation,
        session=None,
        worker=None,
        started_at=min(report.started_at for report in reports),
        ttft_ms=sum(report.ttft_ms * report.answers for report in reports) / answers,
        tpot_ms=sum(report.tpot_ms * report.answers for report in reports) / answers,
        answers=answers,
        **asdict(counts),
        **labels,
    )


def _common(values: Iterable[str]) -> str:
    different = set(values)
    return different.pop() if len(different) == 1 else SEVERAL
