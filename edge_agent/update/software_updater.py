"""The update of a device's own software: from a desired version to a trial of it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeAlias

from edge_agent.state.desired_state import NO_DESIRED_CONFIG
from edge_agent.state.software_slots import (
    SoftwareStore,
    SoftwareTrial,
    confirm_software,
    place_software,
)
from edge_agent.update.background_download import BackgroundDownload
from fleet.errors import SoftwareError
from fleet.protocol.desired_config import DesiredConfig
from fleet.protocol.report import ConfigProblem
from fleet.protocol.types import MAX_LABEL_LENGTH
from fleet.version import __version__

UPDATE_TIMEOUT_S: Final = 300.0

Install: TypeAlias = Callable[[str], None]
"""Installs a version into its slot."""

log = logging.getLogger(__name__)


class SoftwareUpdater:
    """The updater of one device, for the thread of its supervisor.

    `on_installed` and `on_problem` are called on the thread of the installation, with the version
    and for a problem with that.
    """

    def __init__(
        self,
        store: SoftwareStore,
        install: Install | None,
        on_installed: Callable[[str], None],
        on_problem: Callable[[str, ConfigProblem], None],
        *,
        timeout_s: float = UPDATE_TIMEOUT_S,
    ) -> None:
        self._store = store
        self._slots = store.load()
        self._install = install
        self._timeout_s = timeout_s
        self._desired = NO_DESIRED_CONFIG
        self.problem = self._slots.abandoned.problem if self._slots.abandoned else None
        self._download = BackgroundDownload(
            lambda version, _: self._run_install(version),
            lambda version, _: on_installed(version),
            on_problem,
            kind="version",
        )

    @property
    def is_trial(self) -> bool:
        """Whether the running version has not confirmed itself."""
        return self._slots.trial is not None

    def follow(self, desired: DesiredConfig) -> bool:
        """Follow a desired configuration; return whether its version can be placed at once.

        A version on trial confirms itself first: the device can be updated from now on.
        """
        self._confirm()
        self._desired = desired
        version = desired.software
        abandoned = self._slots.abandoned
        if version in (None, __version__):
            self._end_download(None)
        elif abandoned and (abandoned.version, abandoned.config_version) == (
            version,
            desired.version,
        ):
            self._end_download(abandoned.problem)
        elif version == self._slots.base:
            self._end_download(None)
            return True
        else:
            self._start_download(version)
        return False

    def is_desired(self, version: str) -> bool:
        """Whether the newest desired configuration names `version`."""
        return version == self._desired.software

    def place(self) -> ConfigProblem | None:
        """Put the desired version on trial, for the next start; return why that is not possible."""
        trial = SoftwareTrial(
            version=self._desired.software or "",
            config_version=self._desired.version,
            timeout_s=self._timeout_s,
        )
        slots = place_software(self._slots, trial)
        try:
            self._store.save(slots)
        except OSError as error:
            message = f"cannot write below {self._store.folder.parent}: {error}; make room"
            return ConfigProblem(SoftwareError.code, message[:MAX_LABEL_LENGTH], is_final=True)
        self._slots = slots
        return None

    def close(self) -> None:
        """End an installation that is active."""
        self._download.cancel()

    def _confirm(self) -> None:
        if not self.is_trial:
            return
        self._slots = confirm_software(self._slots)
        try:
            self._store.save(self._slots)
        except OSError as error:  # the launcher returns to the previous version
            log.warning("version %s cannot be confirmed on disk: %s", __version__, error)

    def _start_download(self, version: str | None) -> None:
        if version is None or self._install is None:
            return
        if self._download.name != version:
            self.problem = None
            self._store.remove_except(self._slots.current)
        self._download.start(version)

    def _end_download(self, problem: ConfigProblem | None) -> None:
        self._download.cancel()
        self.problem = problem

    def _run_install(self, version: str) -> Path:
        assert self._install
        self._install(version)
        return self._store.slot(version)
