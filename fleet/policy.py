"""Exit decisions as plain functions: values in, a value out."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from fleet.errors import ConfigError


class Mode(StrEnum):
    """Who may answer: the device alone, or the device and, when it is not sure, the cloud."""

    STANDALONE = "standalone"
    COLLABORATIVE = "collaborative"


CLOUD = "cloud"
FALLBACK = "fallback"


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
