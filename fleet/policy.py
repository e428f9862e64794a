"""Exit decisions as plain functions: values in, a value out."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final

from fleet.errors import ConfigError


class Mode(StrEnum):
    """Who decides on a token.

    `standalone`: the device alone. `collaborative`: the device and, where it is not sure, the cloud. `verified`: the
    device drafts and the cloud confirms or corrects every token. `auto`: whichever of these suits the link and the
    targets now.
    """

    STANDALONE = "standalone"
    COLLABORATIVE = "collaborative"
    VERIFIED = "verified"
    AUTO = "auto"


CLOUD = "cloud"
FALLBACK = "fallback"
LOOKUP = "lookup"  # copied from earlier text, and confirmed by the cloud
DEFAULT_AGREEMENT: Final = 0.95  # what auto mode and `fleet plan` keep where nobody says
NO_EXITS: Final = (LOOKUP, CLOUD, FALLBACK)


def exit_source(exit_layer: int) -> str:
    """How a token from the exit after `exit_layer` layers is counted, e.g. ``exit:8``."""
    return f"exit:{exit_layer}"


def exit_emits(confidence: float, threshold: float) -> bool:
    """Whether an exit may emit. A threshold of 1.0 switches it off: a confidence can round to 1.0."""
    return threshold < 1.0 and confidence >= threshold


def parse_mode(value: str) -> Mode:
    """Raises ConfigError naming the known modes."""
    try:
        return Mode(value)
    except ValueError:
        raise ConfigError(f"unknown mode {value!r}: expected one of {', '.join(Mode)}") from None


def check_threshold(value: float) -> float:
    """Raises ConfigError when `value` is outside [0, 1]."""
    if not 0.0 <= value <= 1.0:
        raise ConfigError(f"threshold {value}: expected a number from 0 to 1 (1 switches the exit off)")
    return value


def offload_rate(sources: Mapping[str, int]) -> float:
    """Share of generated tokens that came from the cloud; 0 when there are none."""
    total = sum(sources.values())
    return sources.get(CLOUD, 0) / total if total else 0.0


def assist_deadline_ms(base_ms: int, pending_positions: int) -> int:
    """How long to wait for an assist when the worker has `pending_positions` to run first: 10 ms more for each."""
    return min(base_ms + 10 * pending_positions, 600_000)


def backoff_s(num_failures: int, random: float) -> float:
    """Seconds before the next try: 0.25 doubled with each failure, at most 8, half of it by `random` from [0, 1)."""
    return float(min(8.0, 0.25 * 2.0 ** min(num_failures, 10)) * (0.5 + random / 2))
