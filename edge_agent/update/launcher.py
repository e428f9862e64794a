"""The launcher of a device's software: the version in the current slot runs as a child process.

The launcher belongs to the base, the version that is installed in the environment, and imports
nothing from a slot. docs/adr/0035-software-updates.md has its contract with the versions that it
starts.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Final, NoReturn

from msgspec.structs import replace

from edge_agent.state.software_slots import (
    SoftwareSlots,
    SoftwareStore,
    SoftwareTrial,
    abandon_software,
    count_start,
)
from fleet.errors import SoftwareError
from fleet.utils.service_manager import Watchdog
from fleet.version import __version__

SLOT_ENV: Final = "FLEET_SOFTWARE"  # the version in the child's slot
BASE_ENV: Final = "FLEET_BASE"  # the launcher's own version
LAUNCHER_ENV: Final = "FLEET_LAUNCHER"  # its process id
RESTART_STATUS: Final = 75  # EX_TEMPFAIL of sysexits.h
STOP_S: Final = 30.0  # from a signal until the child is killed
POLL_S: Final = 0.25

log = logging.getLogger(__name__)


def launch(folder: Path) -> None:
    """Run the version in the slot of an identity folder, and exit as it does.

    Return in the process that has to serve: in the base without a slot, and in the child.

    Raises:
        SoftwareError: the version of the child is not that of its slot.
    """
    if slot := os.environ.get(SLOT_ENV):
        if slot != __version__:
            raise SoftwareError(
                f"the wheel of version {slot} holds version {__version__}; "
                "correct __version__ in fleet/version.py and build it again"
            )
        return
    store = SoftwareStore(folder, __version__)
    while (version := _next_version(store)) is not None:
        process = SlotProcess(store, version)
        status = process.run()
        is_asked_to_restart = status == RESTART_STATUS and not process.is_stopping
        if not is_asked_to_restart or store.load().next_version == version:
            sys.exit(status)


def software_store(folder: Path) -> SoftwareStore:
    """Return the store of an identity folder, in the base or in a child."""
    return SoftwareStore(folder, os.environ.get(BASE_ENV, __version__))


def restart() -> NoReturn:
    """End this process, so that the launcher starts what `software.json` names now."""
    sys.stdout.flush()
    if SLOT_ENV in os.environ:
        sys.exit(RESTART_STATUS)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def stop_with_launcher(stop: threading.Event) -> None:
    """Set `stop` when the launcher of this process has ended, on a thread of its own."""
    launcher = os.environ.get(LAUNCHER_ENV)
    if launcher is None:
        return

    def watch() -> None:
        while str(os.getppid()) == launcher:
            time.sleep(POLL_S)
        log.warning("the launcher has ended; this process stops")
        stop.set()

    threading.Thread(target=watch, name="launcher", daemon=True).start()


class SlotProcess:
    """A child process that runs the version in a slot with the arguments of this process."""

    def __init__(self, store: SoftwareStore, version: str) -> None:
        self._store = store
        self._version = version
        self._process: subprocess.Popen[bytes] | None = None
        self._kill_at = math.inf
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    @property
    def is_stopping(self) -> bool:
        """Whether this process was asked to stop."""
        return self._kill_at < math.inf

    def run(self) -> int:
        """Run the child until it ends; return its exit status.

        The status of an abandoned trial is that of a restart.
        """
        command = [sys.executable, "-P", "-m", "edge_agent", *sys.argv[1:]]
        with subprocess.Popen(command, env=self._environment()) as process:
            self._process = process
            if self.is_stopping:
                process.terminate()
            trial = self._store.load().trial
            reason = self._watch_trial(process, trial) if trial else ""
            if not reason:
                return self._wait(process)
        self._abandon(reason)
        return RESTART_STATUS

    def _environment(self) -> dict[str, str]:
        paths = [str(self._store.site(self._version).resolve())]
        if path := os.environ.get("PYTHONPATH"):
            paths.append(path)
        # Without WATCHDOG_PID the child reports its progress to systemd instead of this process.
        inherited = {name: text for name, text in os.environ.items() if name != "WATCHDOG_PID"}
        return inherited | {
            "PYTHONPATH": os.pathsep.join(paths),
            SLOT_ENV: self._version,
            BASE_ENV: __version__,
            LAUNCHER_ENV: str(os.getpid()),
        }

    def _on_signal(self, *_: object) -> None:
        self._kill_at = min(self._kill_at, time.monotonic() + STOP_S)
        if self._process:
            self._process.terminate()

    def _watch_trial(self, process: subprocess.Popen[bytes], trial: SoftwareTrial) -> str:
        """Wait until the trial confirms itself, or a stop; return why it has failed, or ""."""
        deadline = time.monotonic() + trial.timeout_s
        on_cycle = Watchdog().watch("trial")  # the deadline ends a child that hangs
        while not self.is_stopping:
            on_cycle()
            status = process.poll()
            is_late = time.monotonic() > deadline
            if is_late:
                process.kill()
                process.wait()
            if self._store.load().trial is None:  # read after the child's end
                return ""
            if is_late:
                return f"it did not report within {trial.timeout_s:g} s"
            if status is not None:
                return f"it ended with status {status} before it reported; see the device's log"
            time.sleep(POLL_S)
        return ""

    def _wait(self, process: subprocess.Popen[bytes]) -> int:
        while True:
            try:
                status = process.wait(POLL_S)
            except subprocess.TimeoutExpired:
                if time.monotonic() > self._kill_at:
                    process.kill()
            else:
                return status if status >= 0 else 128 - status  # a signal, as in a shell

    def _abandon(self, reason: str) -> None:
        slots = abandon_software(self._store.load(), reason)
        _save(self._store, slots)
        if slots.abandoned:
            log.warning("%s; version %s runs", slots.abandoned.problem.message, _current(slots))


def _next_version(store: SoftwareStore) -> str | None:
    """Count the next start; return the version to start, None for the base."""
    slots = store.load()
    counted = count_start(slots)
    version = counted.next_version
    if version and not store.site(version).is_dir():
        log.warning("the files of version %s are missing", version)
        counted = (
            abandon_software(counted, "its files are missing")
            if counted.trial
            else replace(counted, current=None)
        )
    if counted == slots or _save(store, counted):
        return counted.next_version
    return slots.current  # a start that is not counted must not happen


def _save(store: SoftwareStore, slots: SoftwareSlots) -> bool:
    """Save the slots; log why they cannot be written."""
    try:
        store.save(slots)
    except OSError as error:
        log.warning("slots of software are not saved below %s: %s", store.folder, error)
        return False
    return True


def _current(slots: SoftwareSlots) -> str:
    return slots.current or slots.base
