"""The modes of generation, and the sources under which tokens are counted."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final

from fleet.errors import ConfigError


class Mode(StrEnum):
    """The side that decides on a token.

    `standalone`: the device alone. `collaborative`: the device, and the cloud for tokens below the
    threshold. `verified`: the device drafts and the cloud confirms or corrects every token. `auto`:
    the one of these that currently suits the link and the targets.
    """

    STANDALONE = "standalone"
    COLLABORATIVE = "collaborative"
    VERIFIED = "verified"
    AUTO = "auto"


CLOUD = "cloud"
FALLBACK = "fallback"
LOOKUP = "lookup"  # a token copied from earlier text and confirmed by the cloud
DEFAULT_AGREEMENT: Final = 0.95  # the minimum of auto mode and `fleet plan`
NO_EXITS: Final = (LOOKUP, CLOUD, FALLBACK)


def exit_source(exit_layer: int) -> str:
    """The source of a token from the exit after `exit_layer` layers, e.g. ``exit:8``."""
    return f"exit:{exit_layer}"


def parse_mode(value: str) -> Mode:
    """Parse the name of a mode.

    Raises:
        ConfigError: there is no such mode; the message lists the known ones.
    """
    try:
        return Mode(value)
    except ValueError:
        raise ConfigError(f"unknown mode {value!r}: expected one of {', '.join(Mode)}") from None


def offload_rate(sources: Mapping[str, int]) -> float:
    """The share of generated tokens that came from the cloud; 0 without tokens."""
    total = sum(sources.values())
    return sources.get(CLOUD, 0) / total if total else 0.0
