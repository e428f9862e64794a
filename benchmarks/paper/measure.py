"""Measurement of the rows of the paper's experiments that a file of rows lacks.

Every system answers a sample before the next sample, so that other load on the machine affects all
of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Final

from benchmarks.paper.models import PaperModels
from benchmarks.paper.rig import LOOPBACK, Rig
from benchmarks.paper.rows import Link, Row, RowFile
from benchmarks.paper.sizes import PAPER_LINK, SLOW_LINK, Size
from benchmarks.paper.systems import CALIBRATED, CLOUD_ONLY, NAIVE_SPLIT, OWN, PEERS, SYSTEMS
from fleet.bundles.manifest import Bundle
from fleet.errors import FleetError

TABLE = "table"
SLOW = "slow"
LATENCY = "latency"
PROPORTIONS = "proportions"
PEER = "peers"
PARTS: Final = (TABLE, SLOW, LATENCY, PROPORTIONS, PEER)
ALPACA: Final = "alpaca"
DATASETS: Final = (ALPACA, "xsum")
MAIN: Final = (
    "standalone",
    CALIBRATED,
    "collaborative@0.8",
    "verified",
    CLOUD_ONLY,
    "cached_split_fp16",
    NAIVE_SPLIT,
)
AGAINST_NAIVE: Final = (CLOUD_ONLY, CALIBRATED, "cached_split_fp16", NAIVE_SPLIT)
PROPORTIONAL: Final = (CLOUD_ONLY, CALIBRATED, "collaborative@0.8", "verified")
PAPER_RTT_STEPS: Final = 0.1
"""The paper's round trip in steps of its full model."""
WARM_UP_TOKENS: Final = 8
WARM_UP_PROMPT: Final = "Name three fruits."

Samples = Callable[[str, int], Sequence[str]]
Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row to measure, by its key, and the maximum length of an answer."""

    part: str
    system: str
    dataset: str
    sample: int
    repeat: int
    link: Link
    max_new_tokens: int

    @property
    def key(self) -> tuple[object, ...]:
        link = (self.link.rtt_ms, self.link.mbit_s)
        return self.part, self.system, self.dataset, self.sample, self.repeat, *link


def measure_rows(
    size: Size,
    bundle: Bundle,
    samples: Samples,
    rows: RowFile[Row],
    run: str,
    progress: Progress,
    parts: Sequence[str] = PARTS,
    models: PaperModels | None = None,
) -> None:
    """Add to `rows` the missing ones of `parts`, under the name `run`.

    `samples` returns n prompts of a dataset. `models` are those of the default model by default.
    The peers are left out, with a line to `progress`, where they cannot be installed.

    Raises:
        FleetError: a system fails, or one of its processes ends.
    """
    bench = _Bench(samples, rows, run, progress)
    models = models or PaperModels(bundle, progress)
    experiments = {TABLE: table_cases, SLOW: slow_cases, LATENCY: latency_cases}
    bench.fill(
        [case for part, cases in experiments.items() if part in parts for case in cases(size)],
        models,
    )
    if PROPORTIONS in parts:
        same_class = models.float32()
        link = proportional_link(bench, size, same_class)
        bench.fill(proportional_cases(size, link), same_class)
    if PEER in parts:
        try:
            bench.fill(peer_cases(size), models)
        except FleetError as error:
            progress(f"without the peers: {error}")


def table_cases(size: Size) -> Iterator[Case]:
    """Return every system of ours over the paper's link.

    The naive split, which needs seconds a token, has fewer samples.
    """
    for dataset, sample, system in product(DATASETS, range(size.table_samples), OWN):
        if system != NAIVE_SPLIT or sample < size.naive_samples:
            yield Case(
                part=TABLE,
                system=system,
                dataset=dataset,
                sample=sample,
                repeat=0,
                link=PAPER_LINK,
                max_new_tokens=size.table_tokens,
            )


def slow_cases(size: Size) -> Iterator[Case]:
    """Return the naive split and its rivals on links slower than the paper's.

    The time of the naive split is that of its bytes.
    """
    for sample, system in product(range(size.naive_samples), AGAINST_NAIVE):
        yield Case(
            part=SLOW,
            system=system,
            dataset=ALPACA,
            sample=sample,
            repeat=0,
            link=SLOW_LINK,
            max_new_tokens=size.table_tokens,
        )


def latency_cases(size: Size) -> Iterator[Case]:
    """Return the main systems over every link; the naive split over two of them."""
    fastest = min(size.links, key=lambda link: (link.rtt_ms, -link.mbit_s))
    for repeat, sample, link, system in product(
        range(size.latency_repeats), range(size.latency_samples), size.links, MAIN
    ):
        if system != NAIVE_SPLIT or (link in (PAPER_LINK, fastest) and sample < size.naive_samples):
            yield Case(
                part=LATENCY,
                system=system,
                dataset=ALPACA,
                sample=sample,
                repeat=repeat,
                link=link,
                max_new_tokens=size.latency_tokens,
            )


def proportional_cases(size: Size, link: Link) -> Iterator[Case]:
    """Return the systems of the paper's table with the paper's ratio of steps to the link."""
    for sample, system in product(range(size.table_samples), PROPORTIONAL):
        yield Case(
            part=PROPORTIONS,
            system=system,
            dataset=ALPACA,
            sample=sample,
            repeat=0,
            link=link,
            max_new_tokens=size.table_tokens,
        )


def peer_cases(size: Size) -> Iterator[Case]:
    """Return other projects' engines, alone on the device and behind the paper's link."""
    for sample, system in product(range(size.table_samples), PEERS):
        link = PAPER_LINK if SYSTEMS[system].cloud else LOOPBACK
        yield Case(
            part=PEER,
            system=system,
            dataset=ALPACA,
            sample=sample,
            repeat=0,
            link=link,
            max_new_tokens=size.table_tokens,
        )


def proportional_link(bench: _Bench, size: Size, models: PaperModels) -> Link:
    """Return the paper's bandwidth, and its round trip by the step of the full model.

    There is a row of the full model as well. The step is one of CPU time, which other programs on
    the machine stretch less than the clock's.
    """
    case = Case(
        part=PROPORTIONS,
        system=CLOUD_ONLY,
        dataset=ALPACA,
        sample=0,
        repeat=0,
        link=Link(0.0, PAPER_LINK.mbit_s),
        max_new_tokens=size.table_tokens,
    )
    bench.fill([case], models)
    row = next(row for row in bench.rows if row.key == case.key)
    stepping = 1 - row.ttft_ms / row.total_ms  # the rest is the prompt's
    step_ms = 1e3 * row.cloud_s * stepping / max(1, len(row.token_ids) - 1)
    return Link(round(PAPER_RTT_STEPS * step_ms, 1), PAPER_LINK.mbit_s)


class _Bench:
    """The source and the destination of rows."""

    def __init__(self, samples: Samples, rows: RowFile[Row], run: str, progress: Progress) -> None:
        self.rows = rows
        self._samples = samples
        self._run = run
        self._progress = progress

    def fill(self, cases: Iterable[Case], models: PaperModels) -> None:
        """Measure the missing rows, all on one rig."""
        new_cases = [case for case in cases if case.key not in self.rows]
        counts = {
            case.dataset: 1 + max(c.sample for c in new_cases if c.dataset == case.dataset)
            for case in new_cases
        }
        prompts = {dataset: self._samples(dataset, count) for dataset, count in counts.items()}
        for dataset, count in counts.items():
            if len(prompts[dataset]) < count:
                self._progress(
                    f"{dataset} has {len(prompts[dataset])} samples, of which {count} are needed"
                )
        missing = [case for case in new_cases if case.sample < len(prompts[case.dataset])]
        if not missing:
            return
        names = dict.fromkeys(case.system for case in missing)
        with Rig(models, [SYSTEMS[name] for name in names], self._progress) as rig:
            for name in names:
                self._progress(f"warming up {name}")
                rig.answer(name, WARM_UP_PROMPT, WARM_UP_TOKENS, LOOPBACK)
            for number, case in enumerate(missing, 1):
                step = f"{case.part} {number} of {len(missing)}"
                link = f"{case.link.rtt_ms:g} ms, {case.link.mbit_s:g} Mbit/s"
                self._progress(f"{step}: {case.system}, {case.dataset}, {link}")
                self._add(rig, case, prompts[case.dataset][case.sample])

    def _add(self, rig: Rig, case: Case, prompt: str) -> None:
        answer, cost = rig.answer(case.system, prompt, case.max_new_tokens, case.link)
        self.rows.add(
            Row(
                part=case.part,
                system=case.system,
                dataset=case.dataset,
                sample=case.sample,
                repeat=case.repeat,
                link=case.link,
                run=self._run,
                prompt_tokens=answer.prompt_tokens,
                token_ids=answer.token_ids,
                tokens_from=answer.tokens_from,
                ttft_ms=answer.ttft_ms,
                total_ms=answer.total_ms,
                edge_s=cost.edge_s,
                cloud_s=cost.cloud_s,
                traffic=cost.traffic,
                round_trips=answer.round_trips,
                layer_positions_edge=answer.layer_positions,
                layer_positions_cloud=cost.layer_positions,
                head_calls=answer.head_calls + cost.head_calls,
                head_calls_cloud=cost.head_calls,
                joules=cost.joules,
            )
        )
