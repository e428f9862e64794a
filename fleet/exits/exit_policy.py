"""The exit decision: plain functions of a confidence and a threshold."""

from __future__ import annotations

from fleet.errors import ConfigError


def exit_emits(confidence: float, threshold: float) -> bool:
    """Return whether an exit may emit; 1.0 switches it off, as a confidence can round to 1.0."""
    return threshold < 1.0 and confidence >= threshold


def check_threshold(value: float) -> float:
    """Return `value`; raise ConfigError when it is outside [0, 1]."""
    if not 0.0 <= value <= 1.0:
        raise ConfigError(
            f"threshold {value}: expected a number from 0 to 1 (1 switches the exit off)"
        )
    return value
