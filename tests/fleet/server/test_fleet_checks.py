"""`fleet doctor` on a fleet that runs, and on fleets with faults."""

from __future__ import annotations

import json
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

from fleet.bundles.manifest import Bundle
from fleet.cli import app
from fleet.errors import ConfigError
from fleet.protocol.access import Role
from fleet.protocol.desired_config import Settings
from fleet.protocol.report import DeviceStatus, WorkerStatus
from fleet.registry.targets import Scope, Target
from fleet.server.child_process import child
from fleet.server.fleet_checks import check_fleet
from fleet.server.home import FleetConfig, FleetHome
from fleet.server.host_checks import (
    MAX_EMBEDDED_DEVICES,
    check_broker_limits,
    check_descriptors,
    check_units,
)
from fleet.server.mosquitto import write_mosquitto
from tests.brokers import free_port
from tests.fleet.conftest import add


@pytest.fixture
def home(tmp_path: Path, tiny_bundle: Bundle) -> FleetHome:
    """A fleet whose processes do not run."""
    return FleetHome.create(
        tmp_path / "state",
        FleetConfig(
            host="127.0.0.1", port=free_port(), bundle=str(tiny_bundle.folder), service_port=0
        ),
    )


def problems(home: FleetHome) -> dict[str, str]:
    return {check.name: check.problem for check in check_fleet(home.folder) if check.problem}


def doctor(home: FleetHome) -> tuple[int, Any]:
    result = CliRunner().invoke(app, ["doctor", "--home", str(home.folder), "--json"])
    return result.exit_code, json.loads(result.stdout)


def test_a_fleet_whose_broker_runs_has_no_problem(home: FleetHome) -> None:
    with child("the broker", "fleet.cli", "server", "--home", str(home.folder)) as server:
        server.wait_ready()
        status, diagnosis = doctor(home)
    assert (status, diagnosis["problems"]) == (0, [])
    names = [
        "registry",
        "authority",
        "clock",
        "certificates",
        "identities",
        "broker",
        "broker limits",
        "descriptors",
        "units",
        "bundle",
        "configuration",
        "disk",
    ]
    assert [check["name"] for check in diagnosis["fleet"]] == names


def test_a_broker_that_does_not_run_is_a_problem_and_stops_no_other_check(home: FleetHome) -> None:
    status, diagnosis = doctor(home)
    assert status == 1
    (problem,) = diagnosis["problems"]
    assert problem.startswith("broker: ")
    assert "fleet up" in problem


def remove_the_authority(home: FleetHome) -> None:
    shutil.rmtree(home.folder / "ca")


def record_a_status_from_the_future(home: FleetHome) -> None:
    with home.registry() as registry:
        add(registry, "edge-1")
        tomorrow = time.time() + 86_400
        registry.stats.record_status("edge-1", DeviceStatus(online=False, epoch=1), tomorrow)


def add_a_certificate_that_ends_soon(home: FleetHome) -> None:
    with home.registry() as registry:
        registry.identities.add_identity(
            "old", Role.DEVICE, fingerprint="0" * 64, not_after=time.time() + 86_400
        )


def alter_the_bundle(home: FleetHome) -> None:
    copy = home.folder / "copy"
    shutil.copytree(home.config.bundle, copy)
    (copy / "edge/block_0.onnx").write_bytes(b"other")
    FleetHome.create(
        home.folder,
        FleetConfig(host="127.0.0.1", port=home.config.port, bundle=str(copy), service_port=0),
    )


def serve_another_bundle(home: FleetHome) -> None:
    with home.registry() as registry:
        add(registry, "edge-1")
        registry.stats.record_status(
            "edge-1", DeviceStatus(online=True, epoch=1, bundle_id="b1"), time.time()
        )
        registry.stats.record_worker(
            "worker-1", WorkerStatus(online=True, epoch=1, bundle_ids=("b2",)), time.time()
        )


def set_a_configuration_that_no_device_follows(home: FleetHome) -> None:
    serve_another_bundle(home)
    with home.registry() as registry:
        registry.stats.record_worker(
            "worker-1", WorkerStatus(online=True, epoch=1, bundle_ids=("b1",)), time.time()
        )
        target = Target(Scope.DEVICE, "edge-1")
        registry.desired_state.change_settings(target, lambda _: Settings(max_draft=2))


def make_the_registry_no_database(home: FleetHome) -> None:
    (home.folder / "registry.sqlite").write_bytes(b"no database" * 1000)


def enrol_more_devices_than_the_embedded_broker_holds(home: FleetHome) -> None:
    with home.registry() as registry:
        for number in range(MAX_EMBEDDED_DEVICES + 1):
            add(registry, f"edge-{number}")


def remove_the_brokers_limits(home: FleetHome) -> None:
    with home.registry() as registry:
        config = write_mosquitto(home, registry, home.folder / "mosquitto")
    lines = config.read_text().splitlines()
    config.write_text("\n".join(each for each in lines if not each.startswith("max_connections")))


@pytest.mark.parametrize(
    ("spoil", "name", "says"),
    [
        (remove_the_authority, "authority", "no usable certificate authority"),
        (record_a_status_from_the_future, "clock", "this machine's clock is behind"),
        (add_a_certificate_that_ends_soon, "certificates", "not renewed: old; enrol old again"),
        (enrol_more_devices_than_the_embedded_broker_holds, "broker limits", "--broker mosquitto"),
        (remove_the_brokers_limits, "broker limits", "fleet broker config --out"),
        (alter_the_bundle, "bundle", "was altered"),
        (serve_another_bundle, "bundle", "no worker serves the bundle of edge-1"),
        (set_a_configuration_that_no_device_follows, "configuration", "fleet config diff"),
        (make_the_registry_no_database, "registry", "is not available"),
    ],
)
def test_a_fault_is_named_with_its_remedy(
    home: FleetHome, spoil: Callable[[FleetHome], None], name: str, says: str
) -> None:
    spoil(home)
    assert says in problems(home)[name]


def test_a_mosquitto_as_it_was_written_has_limits(home: FleetHome) -> None:
    with home.registry() as registry:
        write_mosquitto(home, registry, home.folder / "mosquitto")
    finding, problem = check_broker_limits(home)
    assert "has limits" in finding
    assert not problem


def test_one_device_is_counted_as_one(home: FleetHome) -> None:
    with home.registry() as registry:
        add(registry, "edge-1")
    assert check_broker_limits(home) == ("1 device, no mosquitto", "")


def test_too_few_descriptors_are_a_problem(
    home: FleetHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not check_descriptors(home)[1]
    monkeypatch.setattr(resource, "getrlimit", lambda _: (100, 150))
    assert "too few for a connection of each device" in check_descriptors(home)[1]


def test_the_unit_of_the_server_is_found(home: FleetHome, tmp_path: Path) -> None:
    assert check_units(home, [tmp_path])[0].startswith("none")
    (tmp_path / "fleet-server.service").touch()
    assert check_units(home, [tmp_path]) == (f"fleet-server.service in {tmp_path}", "")


def test_certificates_that_no_process_renews_are_named(home: FleetHome, tmp_path: Path) -> None:
    config = msgspec.structs.replace(home.config, service_port=free_port())
    home = FleetHome.create(home.folder, config)
    home.enroll("kitchen", Role.DEVICE, tmp_path / "kitchen")
    home.enroll("cloud-1", Role.WORKER, tmp_path / "cloud-1")
    home.enroll("app-1", Role.APP, tmp_path / "app-1", allow=("kitchen",))
    (check,) = (check for check in check_fleet(home.folder) if check.name == "certificates")
    assert check.found.endswith("no process renews app-1")
    assert not check.problem


def test_a_named_folder_without_a_fleet_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no fleet in"):
        check_fleet(tmp_path)
