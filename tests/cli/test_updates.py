"""`fleet update`, from the command line; tests/system/test_software_update.py has the devices."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fleet.protocol.report import ConfigProblem, DeviceStatus
from fleet.server.home import FleetConfig, FleetHome
from tests.cli.test_errors import assert_one_clear_line
from tests.command_lines import run
from tests.fleet.conftest import add
from tests.wheels import build_wheel

ABANDONED = ConfigProblem("bad_software", "version 0.9.0 is abandoned: it hangs", is_final=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"), "0.9.0")


@pytest.fixture
def home(tmp_path: Path) -> FleetHome:
    """A fleet with a device in the group canary, and one in none."""
    config = FleetConfig(host="127.0.0.1", port=1, bundle="/no/bundle")
    home = FleetHome.create(tmp_path / "state", config)
    with home.registry() as registry:
        add(registry, "kitchen", group="canary")
        add(registry, "hall")
    return home


def run_json(home: FleetHome, *arguments: str) -> Any:
    done = run("update", *arguments, "--json", "--home", str(home.folder))
    assert done.returncode == 0, done.stderr
    return msgspec.json.decode(done.stdout)


def record(home: FleetHome, version: str, config: int, problem: ConfigProblem | None) -> None:
    """Store a status of the kitchen's device."""
    status = DeviceStatus(
        online=True, epoch=1, version=version, config_version=config, software_error=problem
    )
    with home.registry() as registry:
        registry.stats.record_status("kitchen", status, time.time())


def state_of_kitchen(home: FleetHome) -> tuple[str, str]:
    """Return the state of the kitchen's device and its problem."""
    (row,) = run_json(home, "status", "--group", "canary")
    return row["state"], row["problem"]


def test_a_version_is_added_and_listed(home: FleetHome, wheel: Path) -> None:
    assert "versions: none yet" in run("update", "list", "--home", str(home.folder)).stdout
    assert run_json(home, "add", str(wheel))["version"] == "0.9.0"
    record(home, "0.1.0", 0, None)
    row = {"desired": 0, "failed": 0}
    assert run_json(home, "list") == [
        row | {"version": "0.9.0", "is_kept": True, "running": 0},
        row | {"version": "0.1.0", "is_kept": False, "running": 1},
    ]


def test_a_devices_state_follows_its_status(home: FleetHome, wheel: Path) -> None:
    run_json(home, "add", str(wheel))
    assert state_of_kitchen(home) == ("own", "")
    config = run_json(home, "rollout", "0.9.0", "--group", "canary")["version"]
    record(home, "0.1.0", config, None)
    assert state_of_kitchen(home) == ("pending", "")
    record(home, "0.1.0", config, ABANDONED)
    assert state_of_kitchen(home) == ("failed", ABANDONED.message)
    run_json(home, "rollout", "0.9.0", "--group", "canary", "--force")
    assert state_of_kitchen(home)[0] == "pending"  # the error is that of the earlier command
    record(home, "0.9.0", config, None)
    assert state_of_kitchen(home) == ("current", "")


def test_a_stage_waits_for_the_one_before_and_ends_at_a_failure(
    home: FleetHome, wheel: Path
) -> None:
    run_json(home, "add", str(wheel))
    everywhere = ("update", "rollout", "0.9.0", "--all", "--home", str(home.folder))
    assert_one_clear_line(run(*everywhere), "no device runs version 0.9.0 yet")
    config = run_json(home, "rollout", "0.9.0", "--group", "canary")["version"]
    record(home, "0.1.0", config, ABANDONED)
    assert_one_clear_line(run(*everywhere), "kitchen does not run version 0.9.0", "it hangs")
    record(home, "0.9.0", config, None)
    assert "version 0.9.0 is desired for all" in run(*everywhere).stdout
    with home.registry() as registry:
        configs = registry.desired_state.configs()
    assert {config.software for config in configs.values()} == {"0.9.0"}


def test_what_is_no_version_here_is_refused_in_one_line(home: FleetHome, tmp_path: Path) -> None:
    folder = ("--home", str(home.folder))
    assert_one_clear_line(run("update", "rollout", "0.9.0", "hall", *folder), "no version '0.9.0'")
    assert_one_clear_line(run("update", "rollout", "0.9.0", *folder), "expected one device")
    other = tmp_path / "other-1.0-py3-none-any.whl"
    other.write_text("no wheel")
    assert_one_clear_line(run("update", "add", str(other), *folder), "is no usable wheel")
