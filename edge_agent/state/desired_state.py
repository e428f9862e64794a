"""The configuration that the fleet wants of a device: laid over its own settings, followed as a whole or not at all."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Any, Final

import msgspec

from edge_agent.config import AgentConfig
from edge_agent.state.bundle_slots import Slots, has_given_up
from fleet.errors import ConfigError, ProtocolError
from fleet.protocol.desired_config import DesiredConfig, Settings, decode_desired, encode_desired
from fleet.utils.atomic_files import write_file

DESIRED_FILE: Final = "desired.json"
NOTHING_WANTED: Final = DesiredConfig(0, Settings())


class ConfigStep(StrEnum):
    """What follows from a configuration that is wanted."""

    STAY = "stay"
    ADOPT = "adopt"
    CHANGE = "change"
    REFUSE = "refuse"


def next_step(
    wanted: DesiredConfig, followed: DesiredConfig, slots: Slots, serving: str
) -> ConfigStep:
    """What to do about `wanted` on a device that follows another configuration and serves the bundle `serving`.

    A configuration that names no bundle leaves the device with the one that it serves.
    """
    bundle = wanted.settings.bundle
    if bundle in (None, serving):
        return ConfigStep.STAY if wanted == followed else ConfigStep.ADOPT
    return ConfigStep.REFUSE if has_given_up(slots, bundle, wanted.version) else ConfigStep.CHANGE


def lay_over(own: AgentConfig, settings: Settings, exits: tuple[int, ...]) -> AgentConfig:
    """The device's own settings with what the fleet says in their place, for a bundle with `exits`.

    Raises:
        ConfigError: the thresholds do not fit the exits.
    """
    said: dict[str, Any] = {
        name: value
        for name in settings.__struct_fields__
        if (value := getattr(settings, name)) is not None
    }
    said.pop("bundle", None)
    threshold = said.pop("threshold", None)
    if threshold is not None and "thresholds" not in said:
        said["thresholds"] = (threshold,) * len(exits)
    config = msgspec.structs.replace(own, **said)
    if config.thresholds and len(config.thresholds) != len(exits):
        whose = "the fleet's configuration" if "thresholds" in said else "agent.json"
        raise ConfigError(
            f"{whose} has {len(config.thresholds)} thresholds, expected {len(exits)} for the exits {exits}; "
            "correct them, or leave them out for the bundle's own"
        )
    return config


def load_desired(folder: Path) -> DesiredConfig:
    """The configuration that was followed last; one that wants nothing where there is none, or it is not readable."""
    try:
        return decode_desired((folder / DESIRED_FILE).read_bytes())
    except (OSError, ProtocolError):
        return NOTHING_WANTED


def save_desired(folder: Path, desired: DesiredConfig) -> None:
    """Raises OSError."""
    write_file(folder / DESIRED_FILE, encode_desired(desired))
