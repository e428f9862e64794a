"""The columns of the roll-ups, and the lengths of their spans."""

from __future__ import annotations

from typing import Final

from fleet.protocol.counts import COUNT_FIELDS
from fleet.protocol.modes import CLOUD, FALLBACK, Mode
from fleet.protocol.types import DAY_S

HOUR_S: Final = 3600
SPANS_S: Final = (HOUR_S, 6 * HOUR_S, DAY_S, 2 * DAY_S, 4 * DAY_S, 8 * DAY_S, 16 * DAY_S)
"""The lengths of the levels; each is a multiple of the one before."""

SUMMED: Final = {CLOUD: "cloud_tokens", FALLBACK: "fallback_tokens"}
"""The sources whose tokens are columns of `ROLLUPS`; those of all others are rows of `SOURCES`."""

AMOUNTS: Final = ("answers", "errors", *SUMMED.values(), *COUNT_FIELDS)
"""The sums of a roll-up; most are fields of `GenerationCounts`."""

MODES: Final = frozenset(each.value for each in Mode)
UNKNOWN_MODE: Final = ""
"""The mode of the answers that were counted before roll-ups had a mode."""

OTHER_MODE: Final = "other"
"""The mode of answers with an unknown mode, and of reports that sum up several modes."""

NUM_BUCKETS: Final = 32
BUCKETS_MS: Final[tuple[float, ...]] = tuple(2.0 ** (1 + i / 2) for i in range(NUM_BUCKETS - 1))
"""The upper ends of a histogram's buckets: from 2 ms to 65,536 ms by the square root of 2.

The last bucket has no end. A value read from the middle of a bucket is wrong by at most a fifth.
"""

TTFT: Final = tuple(f"ttft_{i}" for i in range(NUM_BUCKETS))
TPOT: Final = tuple(f"tpot_{i}" for i in range(NUM_BUCKETS))


def mode_column(mode: str) -> str:
    """Return the mode under which a report is counted; a device may report any text."""
    return mode if mode in MODES else OTHER_MODE
