"""Figures from rows: the cost of an answer by place, compared with the baselines."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean, quantiles
from typing import Final

from msgspec import Struct

from benchmarks.paper.rows import Link, ModelSizes, Row
from benchmarks.paper.systems import CLOUD_ONLY, NAIVE_SPLIT
from fleet.protocol.modes import offload_rate

CACHED: Final = ("cached_split_fp16", "cached_split_fp32")  # the stronger baseline first
OURS: Final = ("collaborative", "verified")


class Spread(Struct, frozen=True):
    """Median and quartiles."""

    low: float
    median: float
    high: float


class Reduction(Struct, frozen=True, kw_only=True):
    """A system's savings over a baseline for the same samples, as shares of the baseline's sums.

    A share is negative where the system needs more, and None where the baseline needs nothing.
    """

    total: float | None
    cloud_time: float | None
    cloud_work: float | None
    bytes: float | None
    round_trips: float | None


class SystemFigures(Struct, frozen=True, kw_only=True):
    """All answers of one system in one part to one dataset over one link.

    Without `Spread` they are means of an answer. Edge and cloud time are seconds of CPU;
    `communication_s` is the rest of the total, waiting included, and below 0 where both sides work
    at once. `sources` are shares of all tokens; `confident` is the share that an exit of the device
    emitted. `cloud_gflop` counts 2 operations for each parameter that a position meets; attention
    over earlier positions is left out. `agreement` is that with cloud-only, see :func:`agreement`.
    `fewer_than_cached`: both fewer bytes and fewer round trips than the cached split.
    """

    part: str
    dataset: str
    system: str
    link: Link
    answers: int
    tokens: float
    prompt_tokens: float
    total_s: Spread
    token_ms: Spread
    ttft_ms: Spread
    edge_s: float
    cloud_s: float
    communication_s: float
    bytes_up: float
    bytes_down: float
    messages: float
    round_trips: float
    offload_rate: float
    confident: float
    sources: dict[str, float]
    cloud_gflop: float
    joules: float | None
    agreement: float | None
    against: dict[str, Reduction]
    fewer_than_cached: bool | None

    @property
    def bytes(self) -> float:
        """Bytes in both directions."""
        return self.bytes_up + self.bytes_down


def figures(rows: Iterable[Row], model: ModelSizes) -> list[SystemFigures]:
    """Return one for each part, dataset, link and system, in the order of measurement."""
    groups: dict[tuple[str, str, Link], dict[str, list[Row]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for row in rows:
        groups[row.part, row.dataset, row.link][row.system].append(row)
    return [
        _figures(system_rows, systems, model)
        for systems in groups.values()
        for system_rows in systems.values()
    ]


def _figures(
    rows: Sequence[Row], systems: Mapping[str, Sequence[Row]], model: ModelSizes
) -> SystemFigures:
    first = rows[0]
    sources: dict[str, int] = defaultdict(int)
    for row in rows:
        for source, count in row.tokens_from.items():
            sources[source] += count
    tokens = max(1, sum(sources.values()))
    joules = [row.joules for row in rows if row.joules is not None]
    against = {
        name: less
        for name in (CLOUD_ONLY, NAIVE_SPLIT, *CACHED)
        if name != first.system and (less := reduction(rows, systems.get(name, ()), model))
    }
    edge_s = fmean(row.edge_s for row in rows)
    cloud_s = fmean(row.cloud_s for row in rows)
    return SystemFigures(
        part=first.part,
        dataset=first.dataset,
        system=first.system,
        link=first.link,
        answers=len(rows),
        tokens=fmean(len(row.token_ids) for row in rows),
        prompt_tokens=fmean(row.prompt_tokens for row in rows),
        total_s=spread([row.total_ms / 1e3 for row in rows]),
        token_ms=spread(
            [(row.total_ms - row.ttft_ms) / max(1, len(row.token_ids) - 1) for row in rows]
        ),
        ttft_ms=spread([row.ttft_ms for row in rows]),
        edge_s=edge_s,
        cloud_s=cloud_s,
        communication_s=fmean(row.total_ms / 1e3 for row in rows) - edge_s - cloud_s,
        bytes_up=fmean(row.traffic.bytes_up for row in rows),
        bytes_down=fmean(row.traffic.bytes_down for row in rows),
        messages=fmean(map(num_messages, rows)),
        round_trips=fmean(row.round_trips for row in rows),
        offload_rate=offload_rate(sources),
        confident=sum(n for source, n in sources.items() if source.startswith("exit:")) / tokens,
        sources={source: n / tokens for source, n in sources.items()},
        cloud_gflop=fmean(cloud_gflop(row, model) for row in rows),
        joules=fmean(joules) if joules else None,
        agreement=agreement(rows, systems.get(CLOUD_ONLY, ())),
        against=against,
        fewer_than_cached=_fewer_than_cached(against) if first.system.startswith(OURS) else None,
    )


def spread(values: Sequence[float]) -> Spread:
    """Return the quartiles of one or more values, both ends included."""
    low, middle, high = (
        quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    )
    return Spread(low, middle, high)


def cloud_gflop(row: Row, model: ModelSizes) -> float:
    """Return the work of the cloud on one answer, in 10^9 floating-point operations."""
    layers = row.layer_positions_cloud * model.layer_parameters
    return 2e-9 * (layers + row.head_calls_cloud * model.head_parameters)


def num_bytes(row: Row) -> int:
    return row.traffic.bytes_up + row.traffic.bytes_down


def num_messages(row: Row) -> int:
    return row.traffic.messages_up + row.traffic.messages_down


def reduction(rows: Sequence[Row], baseline: Sequence[Row], model: ModelSizes) -> Reduction | None:
    """Compare the answers that both have, by sample and repeat; None when there are none."""
    theirs = {(row.sample, row.repeat): row for row in baseline}
    pairs = [
        (row, theirs[row.sample, row.repeat]) for row in rows if (row.sample, row.repeat) in theirs
    ]
    if not pairs:
        return None

    def less(of: Callable[[Row], float]) -> float | None:
        ours, whole = (sum(map(of, side)) for side in zip(*pairs, strict=True))
        return 1 - ours / whole if whole else None

    return Reduction(
        total=less(lambda row: row.total_ms),
        cloud_time=less(lambda row: row.cloud_s),
        cloud_work=less(lambda row: cloud_gflop(row, model)),
        bytes=less(num_bytes),
        round_trips=less(lambda row: row.round_trips),
    )


def agreement(rows: Sequence[Row], reference: Sequence[Row]) -> float | None:
    """Return the share of tokens that are the reference's, every sample once.

    Tokens count up to and including the first that differs, as the texts differ after it. Return
    None if no sample has a reference.
    """
    theirs = {_text_of(row): row.token_ids for row in reference}
    ours = {_text_of(row): row.token_ids for row in rows if _text_of(row) in theirs}
    same = total = 0
    for sample, ids in ours.items():
        pairs = list(zip(ids, theirs[sample], strict=False))
        equal = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        same = same + equal
        total = total + min(equal + 1, len(pairs))
    return same / total if total else None


def _text_of(row: Row) -> tuple[str, str, int]:
    return row.part, row.dataset, row.sample


def _fewer_than_cached(against: Mapping[str, Reduction]) -> bool | None:
    less = next((against[name] for name in CACHED if name in against), None)
    return None if less is None else (less.bytes or 0) > 0 and (less.round_trips or 0) > 0
