"""Speeds of a device or a worker with a model, as files that the machines measure themselves."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Final, Literal, TypeAlias

import msgspec
from msgspec import Meta, Struct

from fleet.bundles.manifest import Manifest
from fleet.errors import ConfigError
from fleet.utils.printable import print_line, printable_json
from fleet.utils.text_files import read_json

MachineSide = Literal["device", "worker"]
Speed: TypeAlias = Annotated[float, Meta(gt=0, le=1e9)]

BUSY: Final = 1.0  # load average of other work
MEASURE: Final[dict[str, str]] = {
    "device": "edge-agent measure BUNDLE --out FILE",
    "worker": "python -m cloud_broker_worker measure BUNDLE --out FILE",
}


class MachineSpeeds(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Speeds of one side of a split.

    `weights` are a device's preset, or a worker's kind of weights. `layer_ms` is the time of one
    layer for one position, `head_ms` that of an LM head, exit included, and `prompt_layer_ms` that
    of one layer for a position of a prompt.
    """

    side: MachineSide
    model: str
    weights: str
    processor: str
    num_threads: int
    layer_ms: Speed
    head_ms: Speed
    prompt_layer_ms: Speed

    def step_ms(self, num_layers: int, num_heads: float = 1.0) -> float:
        """Return the time of a token through some layers and heads."""
        return num_layers * self.layer_ms + num_heads * self.head_ms


def read_speeds(path: Path, side: MachineSide, manifest: Manifest) -> MachineSpeeds:
    """Read the speeds of a machine with a bundle's model.

    Raises:
        ConfigError: the file is missing or is not one, or is of the other side or another model.
    """
    remedy = f"make it on the machine with '{MEASURE[side]}'"
    speeds: MachineSpeeds = read_json(path, MachineSpeeds, remedy)
    if speeds.side != side:
        raise ConfigError(f"{path}: expected speeds of a {side}, got a {speeds.side}'s; {remedy}")
    measured = f"{speeds.model} {speeds.weights}" if side == "device" else speeds.model
    name = manifest.model.name
    expected = f"{name} {manifest.quantization}" if side == "device" else name
    if measured != expected:
        raise ConfigError(f"{path}: expected the speeds of {expected}, got {measured}; {remedy}")
    return speeds


def write_speeds(speeds: MachineSpeeds, path: Path) -> None:
    """Write speeds as readable JSON; raise ConfigError when the file cannot be written."""
    try:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(speeds), indent=1) + b"\n")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}; choose another --out") from None


def report_speeds(speeds: MachineSpeeds, out: Path, *, as_json: bool) -> None:
    """Print speeds as JSON, or write them to a file and print the next step."""
    if as_json:
        print(printable_json(msgspec.json.encode(speeds).decode()))
        return
    write_speeds(speeds, out)
    option = "--machine" if speeds.side == "device" else "--worker"
    print_line(
        f"a layer takes {speeds.layer_ms:.3f} ms, an LM head {speeds.head_ms:.2f} ms, a prompt's "
        f"position {speeds.prompt_layer_ms:.4f} ms a layer; in {out}, for 'fleet plan {option}'"
    )


def warn_about_load() -> None:
    """Warn about other work on the machine, which makes the times too long."""
    load = os.getloadavg()[0]
    if load > BUSY:
        print_progress(f"the machine is busy (load {load:.1f}): times will be too long")


def print_progress(line: str) -> None:
    """Print a line of progress on stderr."""
    print(line, file=sys.stderr, flush=True)
