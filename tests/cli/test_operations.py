"""The commands of docs/operations.md, as they stand there."""

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

from benchmarks.postgresql import find_postgresql
from fleet.cli.serve import free_port
from fleet.cli.state import State, StateConfig
from fleet.manifest import Bundle
from tests.postgresql import Databases
from tests.registry.conftest import add, report

PAGE = (Path(__file__).parents[2] / "docs/operations.md").read_text()
TIMEOUT_S = 120


def commands(section: str, under: str = "") -> str:
    """The first block of commands of a section, behind the line `under`."""
    text = PAGE.split(f"## {section}\n")[1].split("\n## ")[0]
    found = re.search(rf"{under}.*?```sh\n(.*?)```", text, re.DOTALL)
    assert found
    return found[1]


def environment(home: Path, url: str = "") -> dict[str, str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), str(find_postgresql()), os.environ["PATH"]])
    return os.environ | {"PATH": path, "FLEET_HOME": str(home), "DATABASE_URL": url, "NO_COLOR": "1"}


def run(script: str, folder: Path, home: Path, url: str = "") -> None:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=folder, env=environment(home, url), capture_output=True,
        text=True, timeout=TIMEOUT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def fill(home: Path, url: str | None) -> None:
    with State.create(home, StateConfig("127.0.0.1", 1, "/no/bundle", registry=url)).registry() as registry:
        add(registry, "edge-1", group="kitchen")
        registry.record_report("edge-1", report())


def check(home: Path) -> None:
    with State.load(home).registry() as registry:
        assert registry.stats()[0].tokens == 10
        assert registry.record_report("edge-1", report("g2"))
        assert not registry.record_report("edge-1", report())
    assert [path.stat().st_mode & 0o077 for path in (home / "ca").rglob("*key.pem")] == [0]


def test_a_fleet_on_sqlite_comes_back_from_its_backup(tmp_path: Path) -> None:
    home = tmp_path / "home"
    fill(home, None)
    run(commands("Backup", "SQLite:"), tmp_path, home)
    shutil.rmtree(home)
    run(commands("Restore", "SQLite:"), tmp_path, home)
    check(home)


def test_a_fleet_on_postgresql_comes_back_from_its_backup(tmp_path: Path, postgresql: Databases) -> None:
    home, name = tmp_path / "home", "restored"
    url = postgresql.server.create(name)
    fill(home, url)
    run(commands("Backup", "PostgreSQL:"), tmp_path, home, url)
    shutil.rmtree(home)
    postgresql.server.drop(name)
    run(commands("Restore", "PostgreSQL:"), tmp_path, home, url)
    check(home)
    postgresql.server.drop(name)


def test_a_fleet_starts_on_a_new_postgresql_database_and_keeps_it(
    tmp_path: Path, postgresql: Databases, tiny_bundle: Bundle
) -> None:
    home, url = tmp_path / "home", postgresql.server.url("chosen")
    create, up = commands("Which registry").splitlines()
    run(create, tmp_path, home, url)
    _up(up, tmp_path, home, url, tiny_bundle)
    _up(commands("How long single answers are kept"), tmp_path, home, url, tiny_bundle)
    assert State.load(home).config.registry == url
    assert State.load(home).config.retention_days == 30
    with State.load(home).registry() as registry:
        assert {row.name for row in registry.identities()} >= {"collector", "worker-1"}
    stats = subprocess.run(
        ["fleet", "stats", "--json"], env=environment(home), capture_output=True, timeout=TIMEOUT_S, check=True
    )
    assert msgspec.json.decode(stats.stdout) == []
    postgresql.server.drop("chosen")


def _up(command: str, folder: Path, home: Path, url: str, bundle: Bundle) -> None:
    """Runs `fleet up` as written, on a free port and with the tiny bundle, until it says that it is up."""
    options = f"--port {free_port('127.0.0.1')} --service-port 0 --bundle {bundle.folder}"
    process = subprocess.Popen(
        ["bash", "-c", f"exec {command.strip()} {options}"], cwd=folder, env=environment(home, url),
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
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


@pytest.mark.parametrize(
    "line", [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
)
def test_every_line_of_commands_is_one_that_a_test_here_runs(line: str) -> None:
    run_here = [
        commands("Which registry"), commands("How long single answers are kept"), commands("Backup", "SQLite:"),
        commands("Backup", "PostgreSQL:"), commands("Restore", "SQLite:"), commands("Restore", "PostgreSQL:"),
    ]  # fmt: skip
    assert any(line in block for block in run_here)
