"""Counts of answers, and their sums."""

from __future__ import annotations

from fleet.protocol.counts import NO_COUNTS, GenerationCounts

COUNTS = GenerationCounts(
    prompt_tokens=3,
    tokens=5,
    sources={"cloud": 2, "exit:8": 3},
    bytes_up=100,
    bytes_down=10,
    drafted=4,
    assists=1,
    verifies=2,
    judged=3,
    agreed=2,
)


def test_merging_adds_every_count_and_every_source() -> None:
    other = GenerationCounts(
        prompt_tokens=1,
        tokens=2,
        sources={"cloud": 1, "lookup": 1},
        bytes_up=1,
        bytes_down=1,
        assists=1,
    )
    assert COUNTS.merge(other) == GenerationCounts(
        prompt_tokens=4,
        tokens=7,
        sources={"cloud": 3, "exit:8": 3, "lookup": 1},
        bytes_up=101,
        bytes_down=11,
        drafted=4,
        assists=2,
        verifies=2,
        judged=3,
        agreed=2,
    )


def test_merging_no_counts_changes_nothing() -> None:
    assert NO_COUNTS.merge(COUNTS) == COUNTS
    assert COUNTS.merge(NO_COUNTS) == COUNTS


def test_a_limit_cuts_every_amount_and_drops_empty_sources() -> None:
    counts = NO_COUNTS.merge(COUNTS).limited(2)
    assert counts.sources == {"cloud": 2, "exit:8": 2}
    assert (counts.tokens, counts.bytes_up, counts.assists) == (2, 2, 1)
    empty = GenerationCounts(
        prompt_tokens=0, tokens=0, sources={"cloud": 0}, bytes_up=0, bytes_down=0, assists=0
    )
    assert empty.limited(2).sources == {}
