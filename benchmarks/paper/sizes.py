"""Sizes of the paper's experiments."""

from __future__ import annotations

from typing import Final

from msgspec import Struct

from benchmarks.paper.rows import Link

PAPER_LINK: Final = Link(20.0, 31.0)
SLOW_LINK: Final = Link(20.0, 10.0)
GRID: Final = tuple(
    Link(rtt, mbit) for mbit in (10.0, 31.0, 100.0) for rtt in (1.0, 5.0, 20.0, 50.0, 100.0)
)


class Size(Struct, frozen=True, kw_only=True):
    """Samples of each dataset and tokens of each answer, by experiment.

    `naive_samples` are the naive split's.
    """

    name: str
    table_samples: int
    table_tokens: int
    naive_samples: int
    links: tuple[Link, ...]
    latency_samples: int
    latency_tokens: int
    latency_repeats: int
    scored_samples: int


SIZES: Final = {
    size.name: size
    for size in (
        Size(
            name="small",
            table_samples=2,
            table_tokens=32,
            naive_samples=1,
            links=(Link(5.0, 100.0), PAPER_LINK, Link(100.0, 10.0)),
            latency_samples=1,
            latency_tokens=32,
            latency_repeats=2,
            scored_samples=4,
        ),
        Size(
            name="medium",
            table_samples=3,
            table_tokens=100,
            naive_samples=2,
            links=tuple(
                Link(rtt, mbit) for mbit in (10.0, 31.0, 100.0) for rtt in (5.0, 20.0, 100.0)
            ),
            latency_samples=2,
            latency_tokens=32,
            latency_repeats=1,
            scored_samples=32,
        ),
        Size(
            name="full",
            table_samples=100,
            table_tokens=100,
            naive_samples=4,
            links=GRID,
            latency_samples=4,
            latency_tokens=100,
            latency_repeats=3,
            scored_samples=100,
        ),
    )
}
