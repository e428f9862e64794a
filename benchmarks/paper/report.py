"""Tables of the rows: in a terminal, in Markdown, and as JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import fmean
from typing import Any, Final

import msgspec
from msgspec import Struct
from rich.table import Table

from benchmarks.paper.accuracy_summary import Accuracy
from benchmarks.paper.figures import Spread, SystemFigures
from benchmarks.paper.fit import HeldBack
from benchmarks.paper.published import CLAIMS, QUALITY, SOURCE, TIMES, Published
from benchmarks.paper.rows import Run
from benchmarks.paper.systems import CLOUD_ONLY, NAIVE_SPLIT
from benchmarks.scaling import markdown

PAPERS: Final = "collaborative@0.8"  # CE-CoLLM at its threshold
NONE: Final = "-"
PAGE_WIDTH: Final = 100
YES_NO: Final = {True: "yes", False: "no", None: NONE}


class Summary(Struct, frozen=True, kw_only=True):
    """The output of `fleet bench paper --json` and content of benchmarks/data/paper.json.

    `accuracy` has a row for each dataset and system; `held_back` are the links that the planner's
    fit was checked on, where there were enough.
    """

    run: Run
    figures: list[SystemFigures]
    accuracy: list[Accuracy] = []
    held_back: list[HeldBack] = []


class Sheet(Struct, frozen=True):
    """A table of text; the first column is of words."""

    title: str
    header: list[str]
    rows: list[list[str]]

    def rich(self) -> Table:
        """Return the table for a terminal."""
        table = Table(title=self.title, title_justify="left")
        for i, name in enumerate(self.header):
            table.add_column(name, justify="right" if i else "left")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """Return the table for a page, cut into tables of at most `PAGE_WIDTH` columns of text."""
        tables = []
        for columns in self._column_groups():
            header = [self.header[i] for i in columns]
            rows = [[row[i] for i in columns] for row in self.rows]
            tables.append("\n".join(markdown(header, rows)))
        return "\n\n".join([f"**{self.title}**", *tables])

    def _column_groups(self) -> list[list[int]]:
        """Return indices of the columns of each table; the first column is in all of them."""
        lines = [self.header, *self.rows]
        groups = [[0]]
        for i in range(1, len(self.header)):
            columns = [*groups[-1], i]
            if max(len(_line(line, columns)) for line in lines) <= PAGE_WIDTH:
                groups[-1] = columns
            else:
                groups.append([0, i])
        return groups


def _line(cells: Sequence[str], columns: Sequence[int]) -> str:
    return markdown([cells[i] for i in columns], [])[0]


def sheets(summary: Summary) -> dict[str, list[Sheet]]:
    """Return all tables, by their section; a section without rows has none."""
    by_part: dict[str, list[SystemFigures]] = {}
    for one in summary.figures:
        by_part.setdefault(one.part, []).append(one)
    table = by_part.get("table", [])
    return {
        "table": _times_and_traffic(table),
        "slow": _times_and_traffic(by_part.get("slow", [])),
        "published": [*published_times(table), claims(table)] if table else [],
        "latency": [*latency(by_part.get("latency", [])), *held_back(summary.held_back)],
        "proportions": _times_and_traffic(by_part.get("proportions", [])),
        "peers": [times(group) for group in _groups(by_part.get("peers", []))],
        "accuracy": accuracy(summary.accuracy),
    }


def _times_and_traffic(rows: Iterable[SystemFigures]) -> list[Sheet]:
    """Return two tables for each dataset and link."""
    return [sheet for group in _groups(rows) for sheet in (times(group), traffic(group))]


def _groups(rows: Iterable[SystemFigures]) -> Iterator[list[SystemFigures]]:
    """Group figures by dataset and link."""
    groups: dict[object, list[SystemFigures]] = {}
    for one in rows:
        groups.setdefault((one.dataset, one.link), []).append(one)
    yield from groups.values()


def times(group: Sequence[SystemFigures]) -> Sheet:
    """Return the table of time by place."""
    rows = [
        [
            one.system,
            f"{one.answers}",
            f"{one.tokens:.0f}",
            quartiles(one.total_s, 2),
            f"{one.token_ms.median:.0f}",
            f"{one.ttft_ms.median:.0f}",
            *(f"{value:.2f}" for value in (one.edge_s, one.cloud_s, one.communication_s)),
            compared(one, CLOUD_ONLY, "total"),
            compared(one, NAIVE_SPLIT, "total"),
        ]
        for one in group
    ]
    header = [
        "system",
        "answers",
        "tokens",
        "total, s (quartiles)",
        "ms a token",
        "first token, ms",
        "edge, s",
        "cloud, s",
        "communication and waiting, s",
        "less time than cloud-only",
        "less time than the naive split",
    ]
    return Sheet(f"time: {where(group[0])}", header, rows)


def traffic(group: Sequence[SystemFigures]) -> Sheet:
    """Return the table of link traffic and cloud work."""
    rows = []
    for one in group:
        rows.append(
            [
                one.system,
                f"{one.bytes / 1e3:,.1f}",
                f"{one.messages:.0f}",
                f"{one.round_trips:.1f}",
                f"{one.offload_rate:.1%}",
                f"{one.confident:.1%}",
                f"{one.cloud_gflop:.1f}",
                compared(one, CLOUD_ONLY, "cloud_time"),
                compared(one, CLOUD_ONLY, "cloud_work"),
                compared(one, NAIVE_SPLIT, "bytes"),
                YES_NO[one.fewer_than_cached],
                figure(one.agreement),
                NONE if one.joules is None else f"{one.joules:.1f}",
            ]
        )
    header = [
        "system",
        "KB an answer",
        "messages",
        "round trips",
        "tokens of the cloud",
        "tokens of exits",
        "cloud, GFLOP",
        "less cloud time than cloud-only",
        "less cloud work than cloud-only",
        "fewer bytes than the naive split",
        "fewer bytes and round trips than the cached split",
        "agreement with cloud-only",
        "J",
    ]
    return Sheet(f"link and cloud: {where(group[0])}", header, rows)


def published_times(table: Sequence[SystemFigures]) -> Iterator[Sheet]:
    """Return our times next to the paper's, as shares of the total.

    The seconds of an answer are those of different models.
    """
    ours = {(one.dataset, one.system): one for one in table}
    rows = []
    for theirs in TIMES:
        one = ours.get((theirs.dataset, theirs.system))
        total = (one.edge_s + one.cloud_s + one.communication_s) if one else 0.0
        parts = (one.edge_s, one.cloud_s, one.communication_s) if one else (None, None, None)
        rows.append(
            [
                theirs.system,
                f"{theirs.total_s / 100:.2f}",
                NONE if one is None else f"{total:.2f}",
                *_beside(theirs, parts, total),
            ]
        )
    header = ["system", "total, s: paper", "ours"]
    header += [
        f"{part}: {who}" for part in ("edge", "cloud", "communication") for who in ("paper", "ours")
    ]
    yield Sheet(
        f"alpaca, a mean answer, and shares of it, next to the paper's ({SOURCE})", header, rows
    )


def _beside(theirs: Published, parts: Sequence[float | None], total: float) -> Iterator[str]:
    papers = (theirs.edge_s, theirs.cloud_s, theirs.communication_s)
    for paper, own in zip(papers, parts, strict=True):
        yield NONE if paper is None else f"{paper / theirs.total_s:.1%}"
        yield NONE if own is None or not total else f"{own / total:.1%}"


def claims(table: Sequence[SystemFigures]) -> Sheet:
    """Return the paper's other figures next to ours of the same threshold."""
    ours = {(one.dataset, one.system): one for one in table}
    of: dict[str, Callable[[SystemFigures], str]] = {
        "less total time than cloud-only": lambda one: compared(one, CLOUD_ONLY, "total"),
        "less cloud time than cloud-only": lambda one: compared(one, CLOUD_ONLY, "cloud_time"),
        "tokens asked of the cloud": lambda one: percent(one.offload_rate),
        "tokens confident at the first exit": lambda one: percent(first_exit(one)),
    }
    rows = []
    for claim in CLAIMS:
        one = ours.get((claim.dataset, PAPERS))
        naive = ours.get((claim.dataset, NAIVE_SPLIT))
        paper = claim.value if isinstance(claim.value, str) else f"{claim.value:.1%}"
        if one is None:
            own = NONE
        elif claim.name in of:
            own = of[claim.name](one)
        else:
            own = f"{naive.bytes / 1e3:,.1f} KB to {one.bytes / 1e3:,.1f} KB" if naive else NONE
        rows.append([f"{claim.dataset}: {claim.name}", paper, own])
    return Sheet(
        "the paper's other figures, and ours at the same threshold",
        ["figure", "paper", "ours"],
        rows,
    )


def compared(one: SystemFigures, baseline: str, name: str) -> str:
    """Return a reduction, where there is the baseline."""
    less = one.against.get(baseline)
    return NONE if less is None else percent(getattr(less, name))


def first_exit(one: SystemFigures) -> float | None:
    """Return the share of tokens of the shallowest exit; None where no exit gave one."""
    exits = {
        int(source[5:]): share
        for source, share in one.sources.items()
        if source.startswith("exit:")
    }
    return exits[min(exits)] if exits else None


def latency(answers: Sequence[SystemFigures]) -> Iterator[Sheet]:
    """Return seconds of an answer over round trips, a table a bandwidth."""
    for mbit_s in sorted({one.link.mbit_s for one in answers}):
        here = [one for one in answers if one.link.mbit_s == mbit_s]
        rtts = sorted({one.link.rtt_ms for one in here})
        at = {(one.system, one.link.rtt_ms): one.total_s.median for one in here}
        systems = dict.fromkeys(one.system for one in here)
        rows = [
            [
                system,
                f"{fmean(one.tokens for one in here if one.system == system):.0f}",
                *(f"{at[system, rtt]:.2f}" if (system, rtt) in at else NONE for rtt in rtts),
            ]
            for system in systems
        ]
        title = f"median seconds of an answer at {mbit_s:g} Mbit/s, by round trip"
        yield Sheet(title, ["system", "tokens", *(f"{rtt:g} ms" for rtt in rtts)], rows)


def held_back(checked: Sequence[HeldBack]) -> Iterator[Sheet]:
    """Return the errors of `fleet plan` on links that were not fitted."""
    if checked:
        rows = [
            [
                one.system,
                link(one.link),
                f"{one.measured_s:.2f}",
                f"{one.predicted_s:.2f}",
                f"{one.error:.1%}",
            ]
            for one in checked
        ]
        header = ["system", "link", "measured, s", "predicted, s", "error"]
        yield Sheet("links that the planner's fit did not see", header, rows)


def accuracy(scores: Sequence[Accuracy]) -> list[Sheet]:
    """Return scores by dataset and system.

    The paper's stand next to ours of its threshold and of cloud-only.
    """
    if not scores:
        return []
    rows = []
    for one in scores:
        papers = dict(zip((PAPERS, CLOUD_ONLY), QUALITY.get(one.dataset, ()), strict=False))
        rows.append(
            [
                f"{one.dataset}: {one.system}",
                f"{one.num}",
                one.metric,
                f"{one.value:.3f} ({one.low:.3f} to {one.high:.3f})",
                figure(papers.get(one.system)),
                YES_NO[one.is_within_full],
                *(figure(one.details.get(name)) for name in ("majority", "auc")),
                f"{one.agreement:.3f}",
                f"{one.perplexity:.2f}",
                f"{one.offload_rate:.1%}",
            ]
        )
    header = [
        "dataset and system",
        "answers",
        "metric",
        "value (95%)",
        "paper's",
        "within the full model's interval",
        "majority",
        "AUC",
        "agreement with the full model",
        "perplexity",
        "tokens of the cloud",
    ]
    return [Sheet("scores", header, rows)]


def figure(value: float | None) -> str:
    return NONE if value is None else f"{value:.3f}"


def where(one: SystemFigures) -> str:
    return f"{one.dataset} over {link(one.link)}"


def link(of: Any) -> str:
    return f"{of.rtt_ms:g} ms, {of.mbit_s:g} Mbit/s" if of.mbit_s else "loopback"


def quartiles(spread: Spread, digits: int) -> str:
    return f"{spread.median:.{digits}f} ({spread.low:.{digits}f} to {spread.high:.{digits}f})"


def percent(share: float | None) -> str:
    return NONE if share is None else f"{share:.1%}"


def conditions(run: Run) -> str:
    """Return the conditions of the figures, in one sentence."""
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    thresholds = ", ".join(f"{value:g}" for value in run.model.thresholds)
    exits = ", ".join(map(str, run.model.exits))
    text = (
        f"{run.model.name}, exits {exits} (calibrated: {thresholds}) "
        f"of {run.model.num_layers} layers, bundle `{run.bundle_id}`; "
        f"{run.machine.get('processor')}, {run.machine.get('cores')} cores; {versions}; "
        f"seed {run.seed}, size `{run.size}`."
    )
    return textwrap.fill(text, PAGE_WIDTH, break_long_words=False, break_on_hyphens=False)


def encode(summary: Summary) -> bytes:
    """Return the summary as JSON."""
    return msgspec.json.format(msgspec.json.encode(summary), indent=1) + b"\n"
