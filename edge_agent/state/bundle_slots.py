"""The two bundle slots of a device: plain functions on their state, and the file that holds it.

A new bundle is on trial until one step has run with it. If a process finds a
trial that was begun and not confirmed, the last process died on it. The trial is then abandoned,
and the previous bundle is served.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from fleet.bundles.manifest import MANIFEST_FILE
from fleet.errors import BundleError, ConfigError
from fleet.protocol.report import ConfigProblem
from fleet.protocol.types import MAX_LABEL_LENGTH, Amount, Id, Label
from fleet.utils.atomic_files import move_aside, write_file
from fleet.utils.validation import JSON_ERRORS

SLOTS_FILE: Final = "slots.json"
BUNDLES_FOLDER: Final = "bundles"
DIED: Final = "the device died when it was started on it"


class AbandonedTrial(Struct, frozen=True, forbid_unknown_fields=True):
    """A bundle that did not start, and the configuration version that named it."""

    bundle: Id
    version: Amount
    reason: Label

    @property
    def problem(self) -> ConfigProblem:
        """The problem that the device publishes."""
        message = f"bundle {self.bundle} is abandoned: {self.reason}"
        return ConfigProblem(BundleError.code, message[:MAX_LABEL_LENGTH], is_final=True)


class Slots(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The ids of the bundles in the slots.

    `current` None is the base: the bundle that the identity or the command line names. `attempts`
    is the number of starts of the trial, `version` that of the configuration that names it.
    """

    current: Id | None = None
    previous: Id | None = None
    trial: Id | None = None
    version: Amount = 0
    attempts: Amount = 0
    given_up: AbandonedTrial | None = None


def begin_trial(slots: Slots, bundle: str, version: int) -> Slots:
    """Put `bundle` on trial; the slots must be on disk before it is started."""
    attempts = slots.attempts + 1 if slots.trial == bundle else 1
    return replace(slots, trial=bundle, version=version, attempts=attempts, given_up=None)


def confirm_trial(slots: Slots) -> Slots:
    """Make the trial, which has run a step, the current bundle; keep the one before it."""
    return Slots(current=slots.trial, previous=slots.current)


def abandon_trial(slots: Slots, reason: str) -> Slots:
    """Abandon the trial for the configuration version that named it."""
    if slots.trial is None:
        return slots
    abandoned = AbandonedTrial(slots.trial, slots.version, reason[:MAX_LABEL_LENGTH])
    return replace(slots, trial=None, version=0, attempts=0, given_up=abandoned)


def after_restart(slots: Slots) -> Slots:
    """Return the slots of a process that starts with those of the process before it."""
    if slots.attempts:
        return abandon_trial(slots, DIED)
    return replace(slots, trial=None, version=0)


def is_abandoned(slots: Slots, bundle: str, version: int) -> bool:
    """Whether the trial of `bundle` was abandoned for this `version` of the configuration."""
    abandoned = slots.given_up
    return abandoned is not None and (abandoned.bundle, abandoned.version) == (bundle, version)


def unneeded(slots: Slots, present: set[str], desired: str | None = None) -> set[str]:
    """Return the bundles of `present` that can be removed.

    With a `desired` bundle the previous one is not needed: it makes room.
    """
    needed = {slots.current, slots.trial, desired or slots.previous}
    return present - needed


class SlotStore:
    """The file `slots.json` and the folder `bundles` in an identity folder."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / SLOTS_FILE
        self.bundles = folder / BUNDLES_FOLDER

    def load(self) -> Slots:
        """Return the slots on disk, or the base alone where there is no file.

        A damaged file is moved aside, and the newest complete bundle becomes the current one.

        Raises:
            ConfigError: the file cannot be read or moved.
        """
        try:
            return msgspec.json.decode(self._file.read_bytes(), type=Slots)
        except FileNotFoundError:
            return Slots()
        except JSON_ERRORS as error:
            return self._made_again(error)
        except OSError as error:
            raise self._unusable(error) from None

    def _made_again(self, reason: Exception) -> Slots:
        try:
            move_aside(self._file, reason)
            manifests = sorted(
                self.bundles.glob(f"[!.]*/{MANIFEST_FILE}"), key=lambda path: path.stat().st_mtime
            )
        except OSError as error:
            raise self._unusable(error) from None
        return Slots(current=manifests[-1].parent.name if manifests else None)

    def _unusable(self, error: OSError) -> ConfigError:
        return ConfigError(f"cannot use {self._file}: {error.strerror}; check the folder's rights")

    def save(self, slots: Slots) -> None:
        """Write the slots.

        Raises:
            OSError: they cannot be written.
        """
        write_file(self._file, msgspec.json.encode(slots))

    def path(self, bundle: str) -> Path:
        """Return the folder of a bundle."""
        return self.bundles / bundle

    def remove_unneeded(self, slots: Slots, desired: str | None = None) -> None:
        """Remove bundles that are not needed, and partial downloads except that of `desired`."""
        if not self.bundles.is_dir():
            return
        names = {path.name for path in self.bundles.iterdir()}
        partial = {partial_name(desired)} if desired else set()
        for name in unneeded(slots, names, desired) - partial:
            shutil.rmtree(self.bundles / name, ignore_errors=True)


def partial_name(bundle: str) -> str:
    """Return the folder name of a download that is not complete."""
    return f".{bundle}.partial"
