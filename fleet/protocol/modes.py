"""The modes of generation, and the sources that tokens are counted under."""

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


def parse_mode(value: str) -> Mode:
    """Raises ConfigError naming the known modes."""
    try:
        return Mode(value)
    except ValueError:
        raise ConfigError(f"unknown mode {value!r}: expected one of {', '.join(Mode)}") from None


def offload_rate(sources: Mapping[str, int]) -> float:
    """Share of generated tokens that came from the cloud; 0 when there are none."""
    total = sum(sources.values())
    return sources.get(CLOUD, 0) / total if total else 0.0


def assist_deadline_ms(base_ms: int, pending_positions: int) -> int:
    """How long to wait for an assist when the worker has `pending_positions` to run first: 10 ms more for each."""
    return min(base_ms + 10 * pending_positions, 600_000)
