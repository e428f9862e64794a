"""The units of `fleet systemd` and `edge-agent systemd`: valid, with few rights, and they serve."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import pytest

from edge_agent.device_unit import device_unit
from fleet.bundles.manifest import Bundle
from fleet.server.home import FleetHome
from tests import command_lines
from tests.brokers import BROKERS, HOST, free_port, listens, wait_until
from tests.deploy.units import Unit, find_systemd_analyze, run_service, service

MAX_EXPOSURE: Final = "16"  # in tenths, of 100
START_S: Final = 120.0
USER: Final = "fleet"

Run = Callable[[str], str]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command line of this project in an empty folder."""
    modules = {"fleet": "fleet.cli", "edge-agent": "edge_agent"}
    monkeypatch.chdir(tmp_path)

    def run(line: str) -> str:
        program, *arguments = shlex.split(line)
        done = command_lines.run(*arguments, module=modules[program])
        assert done.returncode == 0, f"{line}: {done.stdout}{done.stderr}"
        return done.stdout

    return run


def init(run: Run, bundle: Bundle) -> tuple[int, int]:
    """Create a fleet in `home`; return the ports of its broker and its service."""
    port = free_port()
    service_port = free_port()
    ports = f"--port {port} --service-port {service_port}"
    run(f"fleet init --home home --host {HOST} {ports} --bundle {bundle.folder}")
    return port, service_port


def write_units(run: Run, tmp_path: Path, kind: str, bundle: Bundle) -> list[Path]:
    """Write every unit that the two commands write."""
    init(run, bundle)
    run("fleet enroll kitchen --home home --out kitchen")
    run("fleet enroll cloud-1 --role worker --home home --out cloud-1")
    options = f"--home home --user {USER} --out units"
    run(f"fleet systemd {options} --broker {kind} --workers 2 --listen {HOST}")
    run(f"fleet systemd --worker cloud-1 --user {USER} --out units")
    run(f"edge-agent systemd kitchen --user {USER} --out units")
    return sorted((tmp_path / "units").iterdir())


@pytest.mark.parametrize("kind", BROKERS)
def test_systemd_reads_every_unit_without_a_complaint_and_finds_few_rights(
    run: Run, tmp_path: Path, kind: str, tiny_bundle: Bundle
) -> None:
    program = find_systemd_analyze()
    units = write_units(run, tmp_path, kind, tiny_bundle)
    assert len(units) == (8 if kind == "mosquitto" else 7)
    verified = subprocess.run(
        [program, "verify", "--man=no", *units], capture_output=True, text=True, check=False
    )
    assert (verified.returncode, verified.stderr) == (0, "")
    for unit in units:
        if unit.suffix == ".service":
            options = ("--offline=true", f"--threshold={MAX_EXPOSURE}")
            rated = subprocess.run(
                [program, "security", *options, unit], capture_output=True, text=True, check=False
            )
            assert rated.returncode == 0, rated.stdout


def test_a_unit_restarts_its_process_and_gives_it_files_and_a_watchdog(
    run: Run, tmp_path: Path, tiny_bundle: Bundle
) -> None:
    for path in write_units(run, tmp_path, "embedded", tiny_bundle):
        unit = Unit(path)
        if path.suffix == ".timer" or unit.value("Type") == "oneshot":
            continue
        assert unit.value("Restart") == "always"
        assert unit.value("Type") == "notify"
        assert int(unit.value("WatchdogSec")) >= 60
        assert int(unit.value("LimitNOFILE")) >= 10_000
        assert unit.value("User") == USER
        assert unit.value("WantedBy") == "multi-user.target"


def test_workers_choose_their_weights_at_each_start(
    run: Run, tmp_path: Path, tiny_bundle: Bundle
) -> None:
    for path in write_units(run, tmp_path, "embedded", tiny_bundle):
        if "worker" in path.name:
            (command,) = Unit(path).commands("ExecStart")
            assert "--weights" not in command


def test_a_device_and_its_bundle_may_be_in_the_home_of_a_user(
    run: Run, tmp_path: Path, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    init(run, tiny_bundle)
    run("fleet enroll kitchen --home home --out kitchen")
    path = tmp_path / "kitchen" / "identity.json"
    identity = json.loads(path.read_text())
    monkeypatch.setenv("HOME", str(tmp_path))
    run(f"edge-agent systemd '~/kitchen' --user {USER} --out units")
    (command,) = Unit(tmp_path / "units" / "edge-agent.service").commands("ExecStart")
    assert command[-1] == str(tmp_path / "kitchen")
    monkeypatch.setenv("HOME", "/home/operator")
    path.write_text(json.dumps(identity | {"bundle": "~/model"}))
    assert "BindReadOnlyPaths=/home/operator/model" in device_unit(tmp_path / "kitchen", USER)


@pytest.mark.parametrize("kind", BROKERS)
def test_from_nothing_the_units_lead_to_an_answer_and_a_backup(
    run: Run, tmp_path: Path, kind: str, tiny_bundle: Bundle
) -> None:
    port, service_port = init(run, tiny_bundle)
    run(
        f"fleet systemd --home home --user {USER} --out units --broker {kind} "
        f"--backups {tmp_path}/backups"
    )
    with ExitStack() as stack:
        names = ["fleet-server", "fleet-worker-1"]
        if kind == "mosquitto":
            names.insert(0, "fleet-mosquitto")
        for name in names:
            unit = Unit(tmp_path / f"units/{name}.service")
            stack.enter_context(service(unit, tmp_path / name))
            wait_until(lambda: listens(port), "the broker listens", START_S)
        invitation = json.loads(run("fleet enroll kitchen --home home --json"))
        url = f"https://{HOST}:{service_port}"
        run(f"edge-agent join {invitation['token']} --server {url} --out kitchen")
        run(f"edge-agent systemd kitchen --user {USER} --out units")
        unit = Unit(tmp_path / "units/edge-agent.service")
        stack.enter_context(service(unit, tmp_path / "edge-agent"))
        assert_answer(run)
        (tmp_path / "backups").mkdir()
        backup = run_service(Unit(tmp_path / "units/fleet-backup.service"), tmp_path)
        assert backup.returncode == 0, backup.stderr
    (file,) = (tmp_path / "backups").iterdir()
    run(f"fleet restore {file} --home restored")
    with FleetHome.load(tmp_path / "restored").registry() as registry:
        assert {"kitchen", "worker-1"} <= {row.name for row in registry.identities.all()}


def assert_answer(run: Run) -> None:
    """Ask the device for tokens that only a worker can choose."""
    options = "--home home --threshold 1 --max-new-tokens 4 --json"
    answer: dict[str, Any] = json.loads(run(f"fleet prompt kitchen 'How warm is it?' {options}"))
    (result,) = answer["results"]
    assert result["sources"] == {"cloud": 4}


def test_a_unit_for_another_role_is_refused(run: Run, tmp_path: Path, tiny_bundle: Bundle) -> None:
    init(run, tiny_bundle)
    run("fleet enroll kitchen --home home --out kitchen")
    for line in (
        f"fleet systemd --worker kitchen --user {USER} --out units",
        f"edge-agent systemd home/identities/worker-1 --user {USER} --out units",
    ):
        with pytest.raises(AssertionError, match=r"is the identity of a .*, expected a"):
            run(line)
    assert not (tmp_path / "units").exists()
