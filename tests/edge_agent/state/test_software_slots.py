"""The slots of a device's software: each change of their state, and the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_agent.state.software_slots import (
    MAX_STARTS,
    SOFTWARE_FILE,
    SoftwareSlots,
    SoftwareStore,
    SoftwareTrial,
    abandon_software,
    confirm_software,
    count_start,
    place_software,
)

BASE = SoftwareSlots(base="1.0")
TRIAL = SoftwareTrial(version="1.2", config_version=7, timeout_s=300.0)
RUNNING = SoftwareSlots(base="1.0", current="1.1", previous="1.05")


def test_the_base_is_started_until_a_version_is_placed() -> None:
    assert BASE.next_version is None
    assert place_software(BASE, TRIAL).next_version == "1.2"


def test_a_trial_that_confirms_itself_is_current_and_the_one_before_is_kept() -> None:
    confirmed = confirm_software(count_start(place_software(RUNNING, TRIAL)))
    assert confirmed == SoftwareSlots(base="1.0", current="1.2", previous="1.1")
    assert confirm_software(confirmed) == confirmed


def test_an_abandoned_trial_leaves_the_current_version_and_its_reason() -> None:
    abandoned = abandon_software(place_software(RUNNING, TRIAL), "it hangs")
    assert abandoned.next_version == "1.1"
    assert abandoned.abandoned is not None
    assert abandoned.abandoned.config_version == 7
    assert abandoned.abandoned.problem.message == "version 1.2 is abandoned: it hangs"
    assert abandon_software(RUNNING, "it hangs") == RUNNING


def test_a_trial_has_a_limited_number_of_starts() -> None:
    slots = place_software(RUNNING, TRIAL)
    for _ in range(MAX_STARTS):
        slots = count_start(slots)
        assert slots.next_version == "1.2"
    assert count_start(slots).next_version == "1.1"
    assert count_start(RUNNING) == RUNNING


def test_the_base_needs_no_trial() -> None:
    back = place_software(RUNNING, SoftwareTrial(version="1.0", config_version=8, timeout_s=1.0))
    assert back == SoftwareSlots(base="1.0", previous="1.1")


def test_the_file_keeps_the_slots_of_its_base_alone(tmp_path: Path) -> None:
    store = SoftwareStore(tmp_path, "1.0")
    assert store.load() == BASE
    slots = place_software(RUNNING, TRIAL)
    store.save(slots)
    assert store.load() == slots
    assert SoftwareStore(tmp_path, "2.0").load() == SoftwareSlots(base="2.0")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b'{"base": 1}', b"\xff", b'{"current": "../x"}', b'{"later": ' + b"[" * 10_000],
)
def test_a_damaged_file_leaves_the_base(tmp_path: Path, content: bytes) -> None:
    (tmp_path / SOFTWARE_FILE).write_bytes(content)
    assert SoftwareStore(tmp_path, "1.0").load() == BASE


def test_fields_of_a_later_version_are_ignored(tmp_path: Path) -> None:
    (tmp_path / SOFTWARE_FILE).write_bytes(b'{"base": "1.0", "current": "1.1", "colour": "red"}')
    assert SoftwareStore(tmp_path, "1.0").load().current == "1.1"


def test_slots_that_are_not_needed_are_removed(tmp_path: Path) -> None:
    store = SoftwareStore(tmp_path, "1.0")
    store.remove_except("1.1")
    for version in ("1.0", "1.1", ".new-x"):
        store.site(version).mkdir(parents=True)
    store.remove_except("1.1", None)
    assert [path.name for path in store.folder.iterdir()] == ["1.1"]
