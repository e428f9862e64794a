"""The slots of a device: trials, their confirmation, and their failure."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from edge_agent.state.bundle_slots import (
    DIED,
    AbandonedTrial,
    Slots,
    SlotStore,
    abandon_trial,
    after_restart,
    begin_trial,
    confirm_trial,
    is_abandoned,
    partial_name,
    unneeded,
)
from fleet.errors import ConfigError

SERVED = Slots(current="a", previous="o")
ON_TRIAL = Slots(current="a", previous="o", trial="b", version=5, attempts=1)


def test_a_trial_does_not_change_the_current_bundle() -> None:
    assert begin_trial(SERVED, "b", 5) == ON_TRIAL


def test_a_confirmed_trial_is_current_and_the_bundle_before_it_is_kept() -> None:
    assert confirm_trial(ON_TRIAL) == Slots(current="b", previous="a")


def test_a_trial_that_fails_is_abandoned_with_its_reason() -> None:
    assert abandon_trial(ON_TRIAL, "no memory") == Slots(
        current="a", previous="o", given_up=AbandonedTrial("b", 5, "no memory")
    )


def test_a_trial_that_ended_a_process_is_abandoned_by_the_next() -> None:
    assert after_restart(ON_TRIAL) == Slots(
        current="a", previous="o", given_up=AbandonedTrial("b", 5, DIED)
    )


def test_without_a_trial_a_process_has_the_slots_of_the_one_before() -> None:
    assert after_restart(SERVED) == SERVED
    assert after_restart(abandon_trial(ON_TRIAL, "no memory")) == abandon_trial(
        ON_TRIAL, "no memory"
    )


def test_only_the_version_that_failed_is_refused() -> None:
    slots = abandon_trial(ON_TRIAL, "no memory")
    assert is_abandoned(slots, "b", 5)
    assert not is_abandoned(slots, "b", 6)
    assert not is_abandoned(slots, "c", 5)
    assert not is_abandoned(SERVED, "b", 5)


def test_a_reason_is_cut_to_the_length_of_a_label() -> None:
    assert abandon_trial(ON_TRIAL, "x" * 1000).given_up == AbandonedTrial("b", 5, "x" * 200)


@pytest.mark.parametrize(("wanted", "gone"), [(None, {"x"}), ("n", {"x", "o"})])
def test_a_new_bundle_replaces_the_previous_one(wanted: str | None, gone: set[str]) -> None:
    assert unneeded(SERVED, {"a", "o", "x"}, wanted) == gone


def test_slots_survive_the_process(tmp_path: Path) -> None:
    SlotStore(tmp_path).save(ON_TRIAL)
    assert SlotStore(tmp_path).load() == ON_TRIAL


def test_without_a_file_there_is_only_the_base(tmp_path: Path) -> None:
    assert SlotStore(tmp_path).load() == Slots()


@pytest.mark.parametrize("content", [b"", b'{"current": 3}', b"\xff"])
def test_damaged_slots_are_moved_aside_and_the_newest_complete_bundle_is_current(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    store = SlotStore(tmp_path)
    for age_s, name in ((20, "old"), (10, "new"), (0, ".next.partial")):
        folder = store.bundles / name
        folder.mkdir(parents=True)
        (folder / "manifest.json").touch()
        written_at = time.time() - age_s
        os.utime(folder / "manifest.json", (written_at, written_at))
    (store.bundles / "incomplete").mkdir()
    (tmp_path / "slots.json").write_bytes(content)
    assert store.load() == Slots(current="new")
    assert (tmp_path / "slots.json.damaged").read_bytes() == content
    assert len(caplog.messages) == 1
    assert "slots.json is damaged" in caplog.text


def test_damaged_slots_without_a_bundle_are_the_identitys_own(tmp_path: Path) -> None:
    (tmp_path / "slots.json").touch()
    assert SlotStore(tmp_path).load() == Slots()


def test_slots_that_cannot_be_read_are_named_in_the_error(tmp_path: Path) -> None:
    (tmp_path / "slots.json").mkdir()
    with pytest.raises(ConfigError, match=r"cannot use .*slots\.json"):
        SlotStore(tmp_path).load()


def test_unneeded_bundles_are_removed_and_an_active_download_is_kept(tmp_path: Path) -> None:
    store = SlotStore(tmp_path)
    for name in ("a", "o", "x", partial_name("n"), partial_name("x")):
        (store.bundles / name / "edge").mkdir(parents=True)
    store.remove_unneeded(SERVED, "n")
    assert {path.name for path in store.bundles.iterdir()} == {"a", partial_name("n")}
