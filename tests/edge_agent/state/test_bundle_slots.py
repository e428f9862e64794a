"""Which bundle is served, and what a trial that fails leaves behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_agent.state.bundle_slots import (
    DIED,
    GivenUp,
    Slots,
    SlotStore,
    attempt,
    confirm,
    give_up,
    has_given_up,
    partial_name,
    resume,
    unneeded,
)
from fleet.errors import ConfigError

SERVED = Slots(current="a", previous="o")
ON_TRIAL = Slots(current="a", previous="o", trial="b", version=5, attempts=1)


def test_a_trial_leaves_what_is_served_alone() -> None:
    assert attempt(SERVED, "b", 5) == ON_TRIAL


def test_a_trial_that_runs_is_served_and_what_was_before_is_kept() -> None:
    assert confirm(ON_TRIAL) == Slots(current="b", previous="a")


def test_a_trial_that_fails_is_given_up_with_its_reason() -> None:
    assert give_up(ON_TRIAL, "no memory") == Slots(
        current="a", previous="o", given_up=GivenUp("b", 5, "no memory")
    )


def test_a_trial_that_ended_a_process_is_given_up_by_the_next() -> None:
    assert resume(ON_TRIAL) == Slots(current="a", previous="o", given_up=GivenUp("b", 5, DIED))


def test_without_a_trial_a_process_goes_on_as_the_one_before() -> None:
    assert resume(SERVED) == SERVED
    assert resume(give_up(ON_TRIAL, "no memory")) == give_up(ON_TRIAL, "no memory")


def test_only_the_version_that_failed_is_refused() -> None:
    slots = give_up(ON_TRIAL, "no memory")
    assert has_given_up(slots, "b", 5)
    assert not has_given_up(slots, "b", 6)
    assert not has_given_up(slots, "c", 5)
    assert not has_given_up(SERVED, "b", 5)


def test_a_reason_is_as_long_as_a_status_holds() -> None:
    assert give_up(ON_TRIAL, "x" * 1000).given_up == GivenUp("b", 5, "x" * 200)


@pytest.mark.parametrize(("wanted", "gone"), [(None, {"x"}), ("n", {"x", "o"})])
def test_a_new_bundle_takes_the_place_of_the_previous_one(
    wanted: str | None, gone: set[str]
) -> None:
    assert unneeded(SERVED, {"a", "o", "x"}, wanted) == gone


def test_slots_survive_the_process(tmp_path: Path) -> None:
    SlotStore(tmp_path).save(ON_TRIAL)
    assert SlotStore(tmp_path).load() == ON_TRIAL


def test_without_a_file_there_is_only_the_base(tmp_path: Path) -> None:
    assert SlotStore(tmp_path).load() == Slots()


def test_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "slots.json").write_text('{"current": 3}')
    with pytest.raises(ConfigError, match=r"slots\.json: .*remove it"):
        SlotStore(tmp_path).load()


def test_what_nobody_needs_goes_and_a_download_under_way_stays(tmp_path: Path) -> None:
    store = SlotStore(tmp_path)
    for name in ("a", "o", "x", partial_name("n"), partial_name("x")):
        (store.bundles / name / "edge").mkdir(parents=True)
    store.remove_unneeded(SERVED, "n")
    assert {path.name for path in store.bundles.iterdir()} == {"a", partial_name("n")}
