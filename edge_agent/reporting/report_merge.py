"""Many reports as one: for a device that has no room for all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final

from fleet.protocol.report import GenerationReport

SEVERAL: Final = "several"


def summarise(reports: Sequence[GenerationReport], generation: str) -> GenerationReport:
    """The sum of reports of one bundle, under the name `generation`: it counts as all their answers, from the first on.

    Times are means over answers. Where the reports differ in what cannot be added, it says `several`, or nothing.
    """
    answers = sum(report.answers for report in reports)
    sources: Counter[str] = Counter()
    for report in reports:
        sources.update(report.sources)

    def mean(values: Iterable[float]) -> float:
        return (
            sum(value * report.answers for value, report in zip(values, reports, strict=True))
            / answers
        )

    return GenerationReport(
        generation=generation,
        app=_common(report.app for report in reports),
        request=_common(report.request for report in reports),
        session=None,
        worker=None,
        bundle_id=_common(report.bundle_id for report in reports),
        mode=_common(report.mode for report in reports),
        started_at=min(report.started_at for report in reports),
        prompt_tokens=sum(report.prompt_tokens for report in reports),
        tokens=sum(report.tokens for report in reports),
        sources=dict(sources),
        assists=sum(report.assists for report in reports),
        bytes_up=sum(report.bytes_up for report in reports),
        bytes_down=sum(report.bytes_down for report in reports),
        ttft_ms=mean(report.ttft_ms for report in reports),
        tpot_ms=mean(report.tpot_ms for report in reports),
        finish_reason=_common(report.finish_reason for report in reports),
        verifies=sum(report.verifies for report in reports),
        drafted=sum(report.drafted for report in reports),
        answers=answers,
        judged=sum(report.judged for report in reports),
        agreed=sum(report.agreed for report in reports),
    )


def _common(values: Iterable[str]) -> str:
    different = set(values)
    return different.pop() if len(different) == 1 else SEVERAL
