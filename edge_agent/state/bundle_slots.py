"""Two bundles on a device, one of which is served: plain functions on what is known of them, and the file they are in.

A new bundle is on trial until one step has run with it. A trial that began and was not confirmed when a process starts
has ended a process before this one: it is given up, and the bundle before it is served.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from fleet.errors import ConfigError
from fleet.protocol.messages import Id
from fleet.protocol.report import MAX_LABEL_LENGTH, Amount, Label
from fleet.utils.atomic_files import write_file

SLOTS_FILE: Final = "slots.json"
BUNDLES_FOLDER: Final = "bundles"
DIED: Final = "the device died when it was started on it"


class GivenUp(Struct, frozen=True, forbid_unknown_fields=True):
    """A bundle that did not start, and the version of the configuration that wanted it."""

    bundle: Id
    version: Amount
    reason: Label

    def __str__(self) -> str:
        return f"bundle {self.bundle} is given up: {self.reason}"


class Slots(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Ids of bundles. `current` None is the base: the bundle that the identity or the command line names.

    `attempts` is how often the trial was started, `version` that of the configuration that wants it.
    """

    current: Id | None = None
    previous: Id | None = None
    trial: Id | None = None
    version: Amount = 0
    attempts: Amount = 0
    given_up: GivenUp | None = None


def attempt(slots: Slots, bundle: str, version: int) -> Slots:
    """`bundle` goes on trial; to be on disk before it is started."""
    attempts = slots.attempts + 1 if slots.trial == bundle else 1
    return replace(slots, trial=bundle, version=version, attempts=attempts, given_up=None)


def confirm(slots: Slots) -> Slots:
    """The trial has run a step: it is served from now on, and what was served before is kept beside it."""
    return Slots(current=slots.trial, previous=slots.current)


def give_up(slots: Slots, reason: str) -> Slots:
    """The trial did not start; the version that wanted it does not try it again."""
    if slots.trial is None:
        return slots
    given_up = GivenUp(slots.trial, slots.version, reason[:MAX_LABEL_LENGTH])
    return replace(slots, trial=None, version=0, attempts=0, given_up=given_up)


def resume(slots: Slots) -> Slots:
    """What a process that starts makes of what the one before it left."""
    return give_up(slots, DIED) if slots.attempts else replace(slots, trial=None, version=0)


def has_given_up(slots: Slots, bundle: str, version: int) -> bool:
    """Whether `bundle` was tried for `version` of the configuration, and given up."""
    given_up = slots.given_up
    return given_up is not None and (given_up.bundle, given_up.version) == (bundle, version)


def unneeded(slots: Slots, present: set[str], wanted: str | None = None) -> set[str]:
    """Of the bundles that are there, those that can go: with one that is `wanted`, the previous one makes room."""
    kept = {slots.current, slots.trial, wanted or slots.previous}
    return present - kept


class SlotStore:
    """`slots.json` and the folder `bundles` in an identity folder."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / SLOTS_FILE
        self.bundles = folder / BUNDLES_FOLDER

    def load(self) -> Slots:
        """What is on disk; nothing but the base where there is no file. Raises ConfigError when it is not usable."""
        try:
            return msgspec.json.decode(self._file.read_bytes(), type=Slots)
        except FileNotFoundError:
            return Slots()
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{self._file}: {error}; remove it to serve the identity's own bundle"
            ) from None

    def save(self, slots: Slots) -> None:
        """Raises OSError."""
        write_file(self._file, msgspec.json.encode(slots))

    def path(self, bundle: str) -> Path:
        return self.bundles / bundle

    def remove_unneeded(self, slots: Slots, wanted: str | None = None) -> None:
        """Removes bundles that nobody needs, and what is left of downloads other than that of `wanted`."""
        if not self.bundles.is_dir():
            return
        names = {path.name for path in self.bundles.iterdir()}
        for name in unneeded(slots, names, wanted) - {partial_name(wanted) if wanted else None}:
            shutil.rmtree(self.bundles / name, ignore_errors=True)


def partial_name(bundle: str) -> str:
    """Folder of a download that is not complete."""
    return f".{bundle}.partial"
