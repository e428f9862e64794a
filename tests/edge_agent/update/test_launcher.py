"""The launcher's choice of the next version; tests/system/test_software_update.py runs it."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_agent.state.software_slots import (
    SOFTWARE_FILE,
    SoftwareSlots,
    SoftwareStore,
    SoftwareTrial,
)
from edge_agent.update import launcher
from edge_agent.update.launcher import SLOT_ENV, _next_version, launch
from fleet.errors import SoftwareError
from fleet.version import __version__

TRIAL = SoftwareTrial(version="9.2", config_version=7, timeout_s=1.0)


@pytest.fixture
def store(tmp_path: Path) -> SoftwareStore:
    """A store with the current version 9.1 and the trial 9.2, whose files are there."""
    store = SoftwareStore(tmp_path, __version__)
    store.site("9.1").mkdir(parents=True)
    store.site("9.2").mkdir(parents=True)
    store.save(SoftwareSlots(base=__version__, current="9.1", trial=TRIAL))
    return store


def test_each_start_of_a_trial_is_counted_on_disk_first(store: SoftwareStore) -> None:
    assert [_next_version(store) for _ in range(4)] == ["9.2", "9.2", "9.2", "9.1"]
    abandoned = store.load().abandoned
    assert abandoned is not None
    assert abandoned.reason == "it was started 3 times and did not report"


def test_a_trial_without_files_is_abandoned(store: SoftwareStore) -> None:
    store.remove_except("9.1")
    assert _next_version(store) == "9.1"
    abandoned = store.load().abandoned
    assert abandoned is not None
    assert abandoned.reason == "its files are missing"


def test_without_the_files_of_the_current_version_the_base_runs(store: SoftwareStore) -> None:
    store.save(SoftwareSlots(base=__version__, current="9.1"))
    store.remove_except()
    assert _next_version(store) is None


def test_a_start_that_cannot_be_counted_does_not_happen(
    store: SoftwareStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SoftwareStore, "save", refuse)
    assert _next_version(store) == "9.1"


def test_a_device_without_slots_runs_in_its_own_process(tmp_path: Path) -> None:
    launch(tmp_path)
    assert not (tmp_path / SOFTWARE_FILE).exists()


def test_a_wheel_that_holds_another_version_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SLOT_ENV, __version__)
    launch(tmp_path)
    monkeypatch.setenv(SLOT_ENV, "9.1")
    with pytest.raises(SoftwareError, match=r"the wheel of version 9\.1 holds version"):
        launch(tmp_path)


def test_the_exit_status_of_a_restart_is_part_of_the_contract() -> None:
    """Earlier launchers start later versions, so these values never change."""
    assert launcher.RESTART_STATUS == 75
    assert (launcher.SLOT_ENV, launcher.BASE_ENV) == ("FLEET_SOFTWARE", "FLEET_BASE")
    assert launcher.LAUNCHER_ENV == "FLEET_LAUNCHER"
