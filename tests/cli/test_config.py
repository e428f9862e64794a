"""`fleet config` and `fleet audit` on a registry with two devices."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fleet.cli import app
from fleet.errors import ConfigError, FleetError, UnknownDeviceError
from fleet.protocol.report import ConfigProblem, DeviceStatus
from fleet.server.home import FleetConfig, FleetHome
from tests.fleet.conftest import add
from tests.pipes import in_pipe


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "state"
    with FleetHome.create(
        path, FleetConfig(host="127.0.0.1", port=1, bundle="/no/bundle")
    ).registry() as registry:
        add(registry, "edge-1", group="kitchen")
        add(registry, "edge-2")
    return path


def fleet(folder: Path, *arguments: str) -> str:
    result = CliRunner().invoke(
        app, [*arguments, "--home", str(folder)], env={"COLUMNS": "150", "NO_COLOR": "1"}
    )
    if result.exception is not None:
        raise result.exception
    return result.stdout


def fleet_json(folder: Path, *arguments: str) -> Any:
    return json.loads(fleet(folder, *arguments, "--json"))


def test_the_settings_of_a_device_are_shown_with_their_version(folder: Path) -> None:
    result = fleet_json(folder, "config", "set", "edge-1", "threshold=0.8", "mode=auto")
    assert result["settings"] == {"mode": "auto", "threshold": 0.8}
    shown = fleet_json(folder, "config", "show", "edge-1")
    assert (shown["version"], shown["settings"]) == (result["version"], result["settings"])
    assert "threshold=0.8" in fleet(folder, "config", "show", "edge-1")


def test_a_group_and_all_reach_their_devices_and_can_be_taken_back(folder: Path) -> None:
    fleet(folder, "config", "set", "--all", "max_draft=4")
    fleet(folder, "config", "set", "--group", "kitchen", "max_draft=8", "thresholds=[0.5]")
    assert fleet_json(folder, "config", "show", "edge-1")["settings"] == {
        "max_draft": 8,
        "thresholds": [0.5],
    }
    assert fleet_json(folder, "config", "show", "edge-2")["settings"] == {"max_draft": 4}
    fleet(folder, "config", "unset", "--group", "kitchen", "max_draft")
    assert fleet_json(folder, "config", "show", "edge-1")["settings"] == {
        "max_draft": 4,
        "thresholds": [0.5],
    }


def test_a_value_may_come_from_a_file(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "thresholds.json").write_text("[0.25, 0.5]")
    result = fleet_json(
        folder, "config", "set", "edge-1", f"thresholds=@{tmp_path}/thresholds.json"
    )
    assert result["settings"] == {"thresholds": [0.25, 0.5]}


def test_a_value_may_come_from_a_pipe(folder: Path) -> None:
    with in_pipe(b"[0.25, 0.5]") as path:
        result = fleet_json(folder, "config", "set", "edge-1", f"thresholds=@{path}")
    assert result["settings"] == {"thresholds": [0.25, 0.5]}


def test_a_bundle_is_desired_by_each_of_its_names(folder: Path) -> None:
    ids = ["8155" + "a" * 28, "81e5" + "b" * 28, "c" * 32, "d" * 32, "e" * 32]
    names = ["Spring.1", "2026.1", "inf"]
    with FleetHome.load(folder).registry() as registry:
        for bundle_id in ids:
            registry.rollouts.add_bundle(bundle_id, "tiny", 1000)
        for bundle_id, name in zip(ids[2:], names, strict=True):
            registry.rollouts.rename_bundle(bundle_id, name)
    texts = ["8155", "81e5", *names]
    for text, bundle_id in zip((*texts, '"Spring.1"', "CCCC"), (*ids, ids[2], ids[2]), strict=True):
        result = fleet_json(folder, "config", "set", "edge-2", f"bundle={text}")
        assert result["settings"] == {"bundle": bundle_id}


def test_a_version_that_looks_like_a_number_is_a_text(folder: Path) -> None:
    result = fleet_json(folder, "config", "set", "--all", "software=1.0", "mode=auto")
    assert result["settings"] == {"software": "1.0", "mode": "auto"}


@pytest.mark.parametrize("text", ["42", "true", "[Be short.]", "a=b", ""])
def test_a_system_prompt_is_a_text_whatever_it_looks_like(folder: Path, text: str) -> None:
    result = fleet_json(folder, "config", "set", "edge-1", f"system_prompt={text}", "top_k=40")
    assert result["settings"] == {"system_prompt": text, "top_k": 40}


def test_blanks_around_the_sign_do_not_count(folder: Path) -> None:
    result = fleet_json(folder, "config", "set", "edge-1", "threshold = 0.8", "mode = auto")
    assert result["settings"] == {"threshold": 0.8, "mode": "auto"}


def test_diff_lists_the_devices_that_do_not_follow_with_the_reason(folder: Path) -> None:
    version = fleet_json(folder, "config", "set", "--all", "max_draft=4")["version"]
    with FleetHome.load(folder).registry() as registry:
        follows = DeviceStatus(
            online=True,
            epoch=1,
            bundle_id="b",
            version="0.1.0",
            mode="auto",
            config_version=version,
        )
        registry.stats.record_status("edge-2", follows, time.time())
    assert [row["device"] for row in fleet_json(folder, "config", "diff")] == ["edge-1"]
    with FleetHome.load(folder).registry() as registry:
        fails = DeviceStatus(
            online=True,
            epoch=1,
            bundle_id="b",
            version="0.1.0",
            mode="auto",
            config_version=version,
            config_error=ConfigProblem("bad_bundle", "no such bundle", is_final=True),
        )
        registry.stats.record_status("edge-1", follows, time.time())
        registry.stats.record_status("edge-2", fails, time.time())
    assert [row["config_error"] for row in fleet_json(folder, "config", "diff")] == [
        {"code": "bad_bundle", "message": "no such bundle", "is_final": True}
    ]
    with FleetHome.load(folder).registry() as registry:
        registry.stats.record_status("edge-2", follows, time.time())
    assert "all 2 devices follow" in fleet(folder, "config", "diff")


@pytest.mark.parametrize(
    ("words", "kind", "says"),
    [
        (("edge-9", "max_draft=4"), UnknownDeviceError, "unknown device 'edge-9'"),
        (("edge-1", "treshold=0.5"), ConfigError, "known settings are .*mode, threshold"),
        (("edge-1", "threshold=high"), ConfigError, "threshold: expected a number from 0 to 1"),
        (("edge-1", "threshold=0,8"), ConfigError, "such as 0.8, got '0,8'$"),
        (("edge-1", "threshold=80%"), ConfigError, "got '80%'$"),
        (("edge-1", "threshold=.8"), ConfigError, "got '.8'$"),
        (("edge-1", "thresholds=0.8"), ConfigError, "thresholds: expected a list, each of it a"),
        (("edge-1", "target_tpot_ms=50ms"), ConfigError, "expected a number above 0 and at most 6"),
        (
            ("edge-1", "max_new_tokens=1e2"),
            ConfigError,
            "expected a whole number from 1 to",
        ),
        (("edge-1", "mode=fast"), ConfigError, "mode: expected one of standalone.*, got 'fast'$"),
        (("edge-1",), ConfigError, "nothing to set"),
        (
            ("edge-1", "threshold", "0.5"),
            ConfigError,
            "KEY=VALUE, got 'edge-1 threshold 0.5'",
        ),
        (("--all", "threshold"), ConfigError, "expected KEY=VALUE, got 'threshold'"),
        (("edge-1", "num_threads=2"), ConfigError, r"num_threads .* set it in agent\.json"),
        (("max_draft=4",), ConfigError, "expected one device, or --group G, or --all"),
        (("edge-1", "--all", "max_draft=4"), ConfigError, "expected one device"),
        (("--group", "attic", "max_draft=4"), ConfigError, "no device is in the group 'attic'"),
        (("edge-1", "thresholds=@/no/file"), ConfigError, "cannot read /no/file"),
    ],
)
def test_an_invalid_setting_is_refused_in_one_line(
    folder: Path, words: tuple[str, ...], kind: type[FleetError], says: str
) -> None:
    with pytest.raises(kind, match=says):
        fleet(folder, "config", "set", *words)
    assert fleet_json(folder, "config", "show", "--all")["settings"] == {}


@pytest.mark.parametrize("target", [("edge-1",), ("--all",), ("--group", "kitchen")])
def test_a_setting_to_remove_that_is_unknown_is_named(
    folder: Path, target: tuple[str, ...]
) -> None:
    says = "unknown setting 'treshold'; known settings are .*mode, threshold"
    with pytest.raises(ConfigError, match=says):
        fleet(folder, "config", "unset", *target, "treshold")


def test_the_audit_log_lists_changes_with_their_subject_newest_first(folder: Path) -> None:
    fleet(folder, "config", "set", "edge-1", "max_draft=4")
    newest, *earlier = fleet_json(folder, "audit")
    assert (newest["action"], newest["subject"]) == ("config", "device:edge-1")
    assert {row["subject"] for row in earlier} >= {"edge-1", "edge-2", "collector"}
    assert [row["subject"] for row in fleet_json(folder, "audit", "edge-2")] == ["edge-2"]
    assert 'settings={"max_draft":4}' in fleet(folder, "audit", "device:edge-1")
