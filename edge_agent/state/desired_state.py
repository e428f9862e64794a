"""The desired configuration of a device: merged into its own settings, as a whole or not at all."""

from __future__ import annotations

from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

import msgspec

from edge_agent.config import AgentConfig
from edge_agent.state.bundle_slots import Slots, is_abandoned
from fleet.bundles.manifest import Manifest
from fleet.errors import ConfigError, ProtocolError
from fleet.protocol.desired_config import DesiredConfig, Settings, decode_desired, encode_desired
from fleet.utils.atomic_files import move_aside, write_file

DESIRED_FILE: Final = "desired.json"
NO_DESIRED_CONFIG: Final = DesiredConfig(0, Settings())


class ConfigStep(StrEnum):
    """The step that follows from a desired configuration."""

    STAY = "stay"
    ADOPT = "adopt"
    CHANGE = "change"
    REFUSE = "refuse"


def next_step(
    desired: DesiredConfig, followed: DesiredConfig, slots: Slots, serving: str
) -> ConfigStep:
    """Return the step of a device that follows another configuration and serves a bundle.

    A configuration that names no bundle leaves the device with the bundle that it serves.
    """
    bundle = desired.settings.bundle
    if bundle in (None, serving):
        return ConfigStep.STAY if desired == followed else ConfigStep.ADOPT
    return ConfigStep.REFUSE if is_abandoned(slots, bundle, desired.version) else ConfigStep.CHANGE


def merge_settings(own: AgentConfig, settings: Settings, manifest: Manifest) -> AgentConfig:
    """Return the device's own settings, overridden by the fleet's, for the bundle of `manifest`.

    Raises:
        ConfigError: the thresholds or the split do not fit its exits.
    """
    exits = manifest.exits
    values = {name: getattr(settings, name) for name in settings.__struct_fields__}
    changes: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
    changes.pop("bundle", None)
    changes.pop("software", None)
    threshold = changes.pop("threshold", None)
    if threshold is not None and "thresholds" not in changes:
        changes["thresholds"] = (threshold,) * len(exits)
    for name in own.locked:
        changes.pop(name, None)
    config = msgspec.structs.replace(own, **changes)
    if config.thresholds and len(config.thresholds) != len(exits):
        origin = "the fleet's configuration" if "thresholds" in changes else "agent.json"
        raise ConfigError(
            f"{origin} has {len(config.thresholds)} thresholds, expected {len(exits)} "
            f"for the exits {exits}; correct them, or leave them out for the bundle's own"
        )
    manifest.split_of(config.split)
    return config


def load_desired(folder: Path) -> DesiredConfig:
    """Return the configuration that was followed last; an empty one where it is not readable.

    A damaged file is moved aside; the broker has the configuration, too.
    """
    path = folder / DESIRED_FILE
    try:
        return decode_desired(path.read_bytes())
    except OSError:
        return NO_DESIRED_CONFIG
    except ProtocolError as error:
        with suppress(OSError):
            move_aside(path, error)
        return NO_DESIRED_CONFIG


def save_desired(folder: Path, desired: DesiredConfig) -> None:
    """Write the configuration that is followed.

    Raises:
        OSError: it cannot be written.
    """
    write_file(folder / DESIRED_FILE, encode_desired(desired))
