"""The commands of docs/operations.md, exactly as written."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from benchmarks.postgresql import find_postgresql
from fleet.bundles.manifest import Bundle, read_manifest, write_manifest
from fleet.cli.systemd import systemd
from fleet.protocol.access import Role
from fleet.server.home import FleetConfig, FleetHome
from tests.brokers import free_port
from tests.fleet.conftest import add, report
from tests.postgresql import Databases

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/operations.md").read_text()
TIMEOUT_S = 120


def commands(section: str, under: str = "") -> str:
    """Return the first block of commands of a section, after the line `under`."""
    text = PAGE.split(f"## {section}\n")[1].split("\n## ")[0]
    found = re.search(rf"{under}.*?```sh\n(.*?)```", text, re.DOTALL)
    assert found
    return found[1]


def environment(home: Path, url: str = "") -> dict[str, str]:
    path = os.pathsep.join(
        [str(Path(sys.executable).parent), str(find_postgresql()), os.environ["PATH"]]
    )
    return os.environ | {
        "PATH": path,
        "FLEET_HOME": str(home),
        "DATABASE_URL": url,
        "NO_COLOR": "1",
    }


def run(script: str, folder: Path, home: Path, url: str = "") -> None:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env=environment(home, url),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def fill(home: Path, url: str | None) -> None:
    with FleetHome.create(
        home, FleetConfig(host="127.0.0.1", port=1, bundle="/no/bundle", registry=url)
    ).registry() as registry:
        add(registry, "edge-1", group="kitchen")
        registry.stats.record_report("edge-1", report())


def check(home: Path) -> None:
    with FleetHome.load(home).registry() as registry:
        assert registry.stats.per_device()[0].tokens == 10
        assert registry.stats.record_report("edge-1", report("g2"))
        assert not registry.stats.record_report("edge-1", report())
    assert [path.stat().st_mode & 0o077 for path in (home / "ca").rglob("*key.pem")] == [0]


def test_a_fleet_on_sqlite_comes_back_from_its_backup(tmp_path: Path) -> None:
    home = tmp_path / "home"
    fill(home, None)
    run(commands("Backup"), tmp_path, home)
    shutil.rmtree(home)
    run(commands("Restore", "SQLite:"), tmp_path, home)
    check(home)


def test_a_fleet_on_postgresql_comes_back_from_its_backup(
    tmp_path: Path, postgresql: Databases
) -> None:
    home = tmp_path / "home"
    name = "restored"
    url = postgresql.server.create(name)
    fill(home, url)
    run(commands("Backup"), tmp_path, home)
    shutil.rmtree(home)
    postgresql.server.drop(name)
    run(commands("Restore", "PostgreSQL:"), tmp_path, home, url)
    check(home)
    postgresql.server.drop(name)


def test_the_units_are_written(tmp_path: Path, tiny_bundle: Bundle) -> None:
    home = tmp_path / "home"
    variables = f"BUNDLE={tiny_bundle.folder}\nUNITS={tmp_path}/units\n"
    run(variables + commands("Start at boot"), tmp_path, home)
    table = PAGE.split("| unit | runs |")[1].split("\n\n")[0]
    listed = set(re.findall(r"^\| `([\w.-]+)`", table, re.MULTILINE))
    assert {path.name for path in (tmp_path / "units").iterdir()} - listed == {
        "fleet-backup.service"
    }


def test_a_later_run_names_the_units_that_are_no_longer_of_the_fleet(
    tmp_path: Path, tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    home = FleetHome.create(
        tmp_path / "home", FleetConfig(host="127.0.0.1", port=1, bundle=str(tiny_bundle.folder))
    )
    out = tmp_path / "my units"
    systemd(out, user="fleet", workers=3, folder=home.folder)
    (out / "fleet-mosquitto.service").touch()
    (out / "fleet-worker.service").touch()  # of a worker with a folder of its own
    assert "of an earlier run" not in capsys.readouterr().out
    systemd(out, user="fleet", workers=1, folder=home.folder)
    stale = [f"fleet-{name}.service" for name in ("mosquitto", "worker-2", "worker-3")]
    line = capsys.readouterr().out.splitlines()[-1]
    assert f"systemctl disable --now {' '.join(stale)} && rm '{out}/{stale[0]}' " in line
    for name in stale:
        (out / name).unlink()
    systemd(out, user="fleet", workers=1, folder=home.folder)
    assert "of an earlier run" not in capsys.readouterr().out


def test_a_fleet_starts_on_a_new_postgresql_database_and_keeps_it(
    tmp_path: Path, postgresql: Databases, tiny_bundle: Bundle
) -> None:
    home = tmp_path / "home"
    url = postgresql.server.url("chosen")
    create, up = commands("Which registry").splitlines()
    run(create, tmp_path, home, url)
    bundle = _without_cloud(tiny_bundle, tmp_path / "bundle")
    _up(up, tmp_path, home, url, bundle)
    _up(commands("How long single answers are kept"), tmp_path, home, url, bundle)
    assert FleetHome.load(home).config.registry == url
    assert FleetHome.load(home).config.retention_days == 30
    with FleetHome.load(home).registry() as registry:
        assert {row.name for row in registry.identities.all()} >= {"collector", "worker-1"}
    stats = subprocess.run(
        ["fleet", "stats", "--json"],
        env=environment(home),
        capture_output=True,
        timeout=TIMEOUT_S,
        check=True,
    )
    assert msgspec.json.decode(stats.stdout) == []
    postgresql.server.drop("chosen")


def _without_cloud(bundle: Bundle, folder: Path) -> Bundle:
    """Copy a bundle as one whose devices hold the whole model, so that no worker is started."""
    shutil.copytree(bundle.folder, folder)
    manifest = read_manifest(folder)
    write_manifest(folder, replace(manifest, upload_layer=manifest.model.num_layers))
    return Bundle.load(folder)


def _up(command: str, folder: Path, home: Path, url: str, bundle: Bundle) -> None:
    """Run `fleet up` as written, on a free port with the tiny bundle, until it is up."""
    options = f"--port {free_port()} --service-port 0 --bundle {bundle.folder}"
    process = subprocess.Popen(
        ["bash", "-c", f"exec {command.strip()} {options}"],
        cwd=folder,
        env=environment(home, url),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout
        lines = iter(process.stdout.readline, "")
        assert any("the fleet is up" in line for line in lines)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(TIMEOUT_S)
        finally:
            process.kill()
            process.communicate()


@pytest.mark.packaging
def test_the_install_lines_give_the_commands_that_the_page_goes_on_with(tmp_path: Path) -> None:
    script = commands("Install").replace(
        "'.[server,worker,export,edge,postgres]'", f"--no-deps {ROOT}"
    )
    run(script, tmp_path, tmp_path / "home")
    assert {"fleet", "edge-agent"} <= {
        path.name for path in (tmp_path / "fleet-venv/bin").iterdir()
    }


def test_doctor_prints_json_and_fails_without_a_broker(
    tmp_path: Path,
) -> None:
    fill(tmp_path / "home", None)
    done = subprocess.run(
        ["bash", "-c", commands("Install", "a timer can run it")],
        env=environment(tmp_path / "home"),
        capture_output=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 1
    assert any(
        problem.startswith("broker") for problem in msgspec.json.decode(done.stdout)["problems"]
    )


def test_with_a_passphrase_the_authoritys_key_is_encrypted_and_needed(
    tmp_path: Path, tiny_bundle: Bundle
) -> None:
    home = tmp_path / "home"
    (tmp_path / "passphrase").write_text("correct horse")
    run(f"BUNDLE={tiny_bundle.folder}\n{commands('TLS')}", tmp_path, home)
    assert b"ENCRYPTED" in (home / "ca/ca-key.pem").read_bytes()
    refused = subprocess.run(
        ["fleet", "enroll", "kitchen", "--out", "kitchen"],
        cwd=tmp_path,
        env=environment(home),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert refused.returncode == 1
    assert "FLEET_CA_PASSPHRASE" in refused.stderr


def test_a_device_is_suspended_resumed_and_revoked_and_the_audit_log_says_so(
    tmp_path: Path,
) -> None:
    home = tmp_path / "home"
    fleet_home = FleetHome.create(home, FleetConfig(host="127.0.0.1", port=1, bundle="/no/bundle"))
    fleet_home.enroll("kitchen", Role.DEVICE, tmp_path / "kitchen")
    run(commands("A person leaves, or a device is stolen"), tmp_path, home)
    with fleet_home.registry() as registry:
        assert registry.stats.device("kitchen").state == "revoked"
        assert [row.action for row in registry.audit_log.entries("kitchen")] == [
            "revoke",
            "resume",
            "suspend",
            "enroll",
        ]


def test_the_authority_is_replaced(tmp_path: Path) -> None:
    home = tmp_path / "home"
    fleet_home = FleetHome.create(home, FleetConfig(host="127.0.0.1", port=1, bundle="/no/bundle"))
    rotate, doctor, retire = commands("Replace the authority").splitlines()
    run(rotate, tmp_path, home)
    fleet_home.renew_own()
    run(f"({doctor.partition('#')[0]} || true) | grep authority", tmp_path, home)
    run(retire, tmp_path, home)
    with fleet_home.registry() as registry:
        actions = [entry.action for entry in registry.audit_log.entries("authority")]
    assert actions == ["retire_authority", "rotate_authority"]


@pytest.mark.parametrize(
    "line",
    [
        line
        for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
        for line in block.splitlines()
    ],
)
def test_every_line_of_commands_is_one_that_a_test_here_runs(line: str) -> None:
    run_here = [
        commands("Which registry"),
        commands("How long single answers are kept"),
        commands("Backup"),
        commands("Start at boot"),
        commands("Restore", "SQLite:"),
        commands("Restore", "PostgreSQL:"),
        commands("Install"),
        commands("Install", "a timer can run it"),
        commands("TLS"),
        commands("A person leaves, or a device is stolen"),
        commands("Replace the authority"),
    ]  # fmt: skip
    assert any(line in block for block in run_here)
