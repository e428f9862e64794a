"""The desired configuration of a device: plain functions and its file."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from edge_agent.config import AgentConfig
from edge_agent.state.bundle_slots import AbandonedTrial, Slots
from edge_agent.state.desired_state import (
    NO_DESIRED_CONFIG,
    ConfigStep,
    load_desired,
    merge_settings,
    next_step,
    save_desired,
)
from fleet.bundles.manifest import SCHEMA_VERSION, Manifest
from fleet.errors import ConfigError
from fleet.protocol.desired_config import DesiredConfig, Settings
from fleet.protocol.modes import Mode
from tests.model_info import TINY_MODEL

OWN = AgentConfig(mode=Mode.STANDALONE, thresholds=(0.5, 0.6), max_draft=3, num_threads=1)
MANIFEST = Manifest(
    schema_version=SCHEMA_VERSION,
    model=TINY_MODEL,
    exits=(1, 2),
    split_layer=2,
    upload_layer=2,
    quantization="fp32",
    top_k=8,
    thresholds=(0.8, 0.8),
    parity={},
    tools={},
    files=(),
)


def test_the_fleets_settings_override_the_devices_own() -> None:
    config = merge_settings(
        OWN, Settings(mode=Mode.AUTO, max_new_tokens=9, min_agreement=0.0), MANIFEST
    )
    assert (config.mode, config.max_new_tokens, config.min_agreement) == (Mode.AUTO, 9, 0.0)
    assert (config.thresholds, config.max_draft, config.num_threads) == ((0.5, 0.6), 3, 1)


def test_settings_that_the_owner_has_locked_are_the_devices_own() -> None:
    own = msgspec.structs.replace(OWN, locked=("mode", "thresholds"))
    config = merge_settings(own, Settings(mode=Mode.AUTO, threshold=0.9, max_draft=7), MANIFEST)
    assert (config.mode, config.thresholds, config.max_draft) == (OWN.mode, OWN.thresholds, 7)


def test_what_the_fleet_does_not_set_cannot_be_locked() -> None:
    with pytest.raises(ValueError, match="cannot lock 'num_threads'; expected some of agreement_"):
        AgentConfig(locked=("num_threads",))


def test_every_setting_of_the_fleet_but_bundle_and_software_is_one_of_the_devices() -> None:
    known = {*AgentConfig.__struct_fields__, "threshold", "bundle", "software"}
    assert set(Settings.__struct_fields__) <= known


def test_one_threshold_applies_to_every_exit() -> None:
    assert merge_settings(OWN, Settings(threshold=0.9), MANIFEST).thresholds == (0.9, 0.9)


@pytest.mark.parametrize(
    ("own", "settings", "whose"),
    [
        (AgentConfig(), Settings(thresholds=(0.5,)), "the fleet's configuration has 1 thresholds"),
        (AgentConfig(thresholds=(0.1, 0.2, 0.3)), Settings(), "agent.json has 3 thresholds"),
    ],
)
def test_thresholds_that_do_not_fit_the_exits_are_refused(
    own: AgentConfig, settings: Settings, whose: str
) -> None:
    with pytest.raises(ConfigError, match=whose):
        merge_settings(own, settings, MANIFEST)


@pytest.mark.parametrize(
    ("own", "settings"),
    [(AgentConfig(), Settings(split=1)), (AgentConfig(split=3), Settings())],
)
def test_a_split_that_the_bundle_does_not_have_is_refused(
    own: AgentConfig, settings: Settings
) -> None:
    with pytest.raises(ConfigError, match=r"split [13]: expected 'auto' or one of 2, the splits"):
        merge_settings(own, settings, MANIFEST)


FOLLOWED = DesiredConfig(4, Settings(bundle="a"))
GIVEN_UP = Slots(current="a", given_up=AbandonedTrial("b", 5, "no memory"))


@pytest.mark.parametrize(
    ("wanted", "slots", "serving", "step"),
    [
        (FOLLOWED, Slots(current="a"), "a", ConfigStep.STAY),
        (FOLLOWED, Slots(current="z"), "z", ConfigStep.CHANGE),
        (DesiredConfig(5, Settings()), Slots(current="a"), "a", ConfigStep.ADOPT),
        (DesiredConfig(3, Settings(bundle="a")), Slots(current="a"), "a", ConfigStep.ADOPT),
        (DesiredConfig(5, Settings(bundle="b")), Slots(current="a"), "a", ConfigStep.CHANGE),
        (DesiredConfig(5, Settings(bundle="b")), GIVEN_UP, "a", ConfigStep.REFUSE),
        (DesiredConfig(6, Settings(bundle="b")), GIVEN_UP, "a", ConfigStep.CHANGE),
    ],
)
def test_the_step_follows_from_the_desired_configuration(
    wanted: DesiredConfig, slots: Slots, serving: str, step: ConfigStep
) -> None:
    assert next_step(wanted, FOLLOWED, slots, serving) is step


def test_a_configuration_survives_the_process(tmp_path: Path) -> None:
    save_desired(tmp_path, FOLLOWED)
    assert load_desired(tmp_path) == FOLLOWED


@pytest.mark.parametrize("content", [None, b"", b"{", b'{"version": -1, "settings": {}}'])
def test_without_a_readable_file_there_is_no_desired_configuration(
    tmp_path: Path, content: bytes | None
) -> None:
    if content is not None:
        (tmp_path / "desired.json").write_bytes(content)
    assert load_desired(tmp_path) == NO_DESIRED_CONFIG


def test_a_damaged_desired_configuration_is_moved_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "desired.json").touch()
    load_desired(tmp_path)
    assert not (tmp_path / "desired.json").exists()
    assert (tmp_path / "desired.json.damaged").exists()
    load_desired(tmp_path)
    assert len(caplog.messages) == 1
