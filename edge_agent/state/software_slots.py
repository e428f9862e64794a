"""The slots of a device's software: plain functions on their state, and the file that holds it.

The version that is installed in the environment is the base. It is served when no slot is. A new
version is on trial until it confirms itself, and is started at most `MAX_STARTS` times before.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Annotated, Final

import msgspec
from msgspec import Meta, Struct
from msgspec.structs import replace

from fleet.errors import SoftwareError
from fleet.protocol.report import ConfigProblem
from fleet.protocol.types import MAX_LABEL_LENGTH, Amount, Label, SoftwareVersion
from fleet.utils.atomic_files import write_file
from fleet.utils.validation import JSON_ERRORS

SOFTWARE_FILE: Final = "software.json"
SOFTWARE_FOLDER: Final = "software"
SITE_FOLDER: Final = "site"
MAX_STARTS: Final = 3

log = logging.getLogger(__name__)

# Versions before and after this one read and write the file: fields are only added, and unknown
# ones are ignored.


class SoftwareTrial(Struct, frozen=True, kw_only=True):
    """A version that has not confirmed itself.

    `config_version` is that of the configuration that names it. `num_starts` is the number of its
    starts, each of which has `timeout_s` seconds.
    """

    version: SoftwareVersion
    config_version: Amount
    timeout_s: Annotated[float, Meta(gt=0)]
    num_starts: Amount = 0


class AbandonedSoftware(Struct, frozen=True, kw_only=True):
    """A version that did not confirm itself, and the configuration version that named it."""

    version: SoftwareVersion
    config_version: Amount
    reason: Label

    @property
    def problem(self) -> ConfigProblem:
        """The problem that the device publishes."""
        message = f"version {self.version} is abandoned: {self.reason}"
        return ConfigProblem(SoftwareError.code, message[:MAX_LABEL_LENGTH], is_final=True)


class SoftwareSlots(Struct, frozen=True, kw_only=True):
    """The versions in the slots; `current` None is the base, whose version is `base`."""

    base: Label
    current: SoftwareVersion | None = None
    previous: SoftwareVersion | None = None
    trial: SoftwareTrial | None = None
    abandoned: AbandonedSoftware | None = None

    @property
    def next_version(self) -> str | None:
        """The version to start: the trial or the current one; None is the base."""
        return self.trial.version if self.trial else self.current


def count_start(slots: SoftwareSlots) -> SoftwareSlots:
    """Count a start of the trial; abandon it when it had all of its starts."""
    trial = slots.trial
    if trial is None:
        return slots
    if trial.num_starts >= MAX_STARTS:
        reason = f"it was started {trial.num_starts} times and did not report"
        return abandon_software(slots, reason)
    return replace(slots, trial=replace(trial, num_starts=trial.num_starts + 1))


def confirm_software(slots: SoftwareSlots) -> SoftwareSlots:
    """Make the trial the current version; keep the one before it."""
    if slots.trial is None:
        return slots
    version = slots.trial.version
    return SoftwareSlots(base=slots.base, current=version, previous=slots.current)


def abandon_software(slots: SoftwareSlots, reason: str) -> SoftwareSlots:
    """Abandon the trial, so that the current version is started."""
    trial = slots.trial
    if trial is None:
        return slots
    abandoned = AbandonedSoftware(
        version=trial.version,
        config_version=trial.config_version,
        reason=reason[:MAX_LABEL_LENGTH],
    )
    return replace(slots, trial=None, abandoned=abandoned)


def place_software(slots: SoftwareSlots, trial: SoftwareTrial) -> SoftwareSlots:
    """Put an installed version on trial; the base needs none."""
    if trial.version == slots.base:
        return SoftwareSlots(base=slots.base, previous=slots.current)
    return replace(slots, trial=trial, abandoned=None)


class SoftwareStore:
    """The file `software.json` and the folder `software` in an identity folder.

    `base` is the version of the software in the environment. Slots of another base are discarded:
    the environment has changed since.
    """

    def __init__(self, folder: Path, base: str) -> None:
        self.folder = folder / SOFTWARE_FOLDER
        self._file = folder / SOFTWARE_FILE
        self._base = base

    def load(self) -> SoftwareSlots:
        """Return the slots on disk; the base alone where there are none that can be used."""
        try:
            slots = msgspec.json.decode(self._file.read_bytes(), type=SoftwareSlots)
        except FileNotFoundError:
            return SoftwareSlots(base=self._base)
        except (OSError, *JSON_ERRORS) as error:
            log.warning("%s: %s; version %s runs", self._file, error, self._base)
            return SoftwareSlots(base=self._base)
        return slots if slots.base == self._base else SoftwareSlots(base=self._base)

    def save(self, slots: SoftwareSlots) -> None:
        """Write the slots.

        Raises:
            OSError: they cannot be written.
        """
        write_file(self._file, msgspec.json.encode(slots))

    def slot(self, version: str) -> Path:
        """Return the folder of a version."""
        return self.folder / version

    def site(self, version: str) -> Path:
        """Return the folder with the packages of a version."""
        return self.slot(version) / SITE_FOLDER

    def remove_except(self, *versions: str | None) -> None:
        """Remove every slot but those of `versions`."""
        if not self.folder.is_dir():
            return
        for path in self.folder.iterdir():
            if path.name not in versions:
                shutil.rmtree(path, ignore_errors=True)
