"""Measures the rows of the paper's experiments: what a file of rows lacks, system by system in turns.

Every system answers a sample before the next sample is taken, so that what else the machine does meets all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product
from typing import Final, NamedTuple

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


class Case(NamedTuple):
    """One row that is to be measured, as its key has it, and how long an answer may be."""

    part: str
    system: str
    dataset: str
    sample: int
    repeat: int
    link: Link
    max_new_tokens: int

    @property
    def key(self) -> tuple[object, ...]:
        return *self[:5], self.link.rtt_ms, self.link.mbit_s


def measure(
    size: Size,
    bundle: Bundle,
    samples: Samples,
    rows: RowFile[Row],
    run: str,
    progress: Progress,
    parts: Sequence[str] = PARTS,
    models: PaperModels | None = None,
) -> None:
    """Adds to `rows` what they lack of `parts`, under the name `run`; `samples` gives n prompts of a dataset.

    `models` are those of the default model by default. The peers are left out, and `progress` told why, where they
    cannot be installed.

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
    """Every system of ours over the paper's link; the naive split, which takes seconds a token, less often."""
    for dataset, sample, system in product(DATASETS, range(size.table_samples), OWN):
        if system != NAIVE_SPLIT or sample < size.naive_samples:
            yield Case(
                TABLE,
                system,
                dataset=dataset,
                sample=sample,
                repeat=0,
                link=PAPER_LINK,
                max_new_tokens=size.table_tokens,
            )


def slow_cases(size: Size) -> Iterator[Case]:
    """What the naive split, whose time is its bytes', loses against where a link is slower than the paper's."""
    for sample, system in product(range(size.naive_samples), AGAINST_NAIVE):
        yield Case(
            SLOW,
            system,
            dataset=ALPACA,
            sample=sample,
            repeat=0,
            link=SLOW_LINK,
            max_new_tokens=size.table_tokens,
        )


def latency_cases(size: Size) -> Iterator[Case]:
    """The main systems over every link; the naive split over the paper's and the fastest only."""
    fastest = min(size.links, key=lambda link: (link.rtt_ms, -link.mbit_s))
    for repeat, sample, link, system in product(
        range(size.latency_repeats), range(size.latency_samples), size.links, MAIN
    ):
        if system != NAIVE_SPLIT or (link in (PAPER_LINK, fastest) and sample < size.naive_samples):
            yield Case(
                LATENCY,
                system,
                dataset=ALPACA,
                sample=sample,
                repeat=repeat,
                link=link,
                max_new_tokens=size.latency_tokens,
            )


def proportional_cases(size: Size, link: Link) -> Iterator[Case]:
    """The systems of the paper's table where a step of either side takes what it takes there, beside the other."""
    for sample, system in product(range(size.table_samples), PROPORTIONAL):
        yield Case(
            PROPORTIONS,
            system,
            dataset=ALPACA,
            sample=sample,
            repeat=0,
            link=link,
            max_new_tokens=size.table_tokens,
        )


def peer_cases(size: Size) -> Iterator[Case]:
    """Other projects' engines, alone on the device and behind the paper's link."""
    for sample, system in product(range(size.table_samples), PEERS):
        link = PAPER_LINK if SYSTEMS[system].cloud else LOOPBACK
        yield Case(
            PEER,
            system,
            dataset=ALPACA,
            sample=sample,
            repeat=0,
            link=link,
            max_new_tokens=size.table_tokens,
        )


def proportional_link(bench: _Bench, size: Size, models: PaperModels) -> Link:
    """The paper's bandwidth, and its round trip by the step of the full model, of which there is a row as well.

    The step is one of CPU time, which other programs on the machine stretch less than the clock's.
    """
    case = Case(
        PROPORTIONS,
        CLOUD_ONLY,
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
    """Where rows come from, and where they go."""

    def __init__(self, samples: Samples, rows: RowFile[Row], run: str, progress: Progress) -> None:
        self.rows = rows
        self._samples = samples
        self._run = run
        self._progress = progress

    def fill(self, cases: Iterable[Case], models: PaperModels) -> None:
        """Measures those that there are no rows of, all on one rig."""
        wanted = [case for case in cases if case.key not in self.rows]
        counts = {
            case.dataset: 1 + max(c.sample for c in wanted if c.dataset == case.dataset)
            for case in wanted
        }
        prompts = {dataset: self._samples(dataset, count) for dataset, count in counts.items()}
        for dataset, count in counts.items():
            if len(prompts[dataset]) < count:
                self._progress(
                    f"{dataset} has {len(prompts[dataset])} samples, of which {count} were wanted"
                )
        missing = [case for case in wanted if case.sample < len(prompts[case.dataset])]
        if not missing:
            return
        names = dict.fromkeys(case.system for case in missing)
        with Rig(models, [SYSTEMS[name] for name in names], self._progress) as rig:
            for name in names:
                self._progress(f"warming up {name}")
                rig.answer(name, WARM_UP_PROMPT, WARM_UP_TOKENS, LOOPBACK)
            for number, case in enumerate(missing, 1):
                where = f"{case.link.rtt_ms:g} ms, {case.link.mbit_s:g} Mbit/s"
                self._progress(
                    f"{case.part} {number} of {len(missing)}: {case.system}, {case.dataset}, {where}"
                )
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
